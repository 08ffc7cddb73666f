"""A small character-level GPT on tiny Shakespeare, to compare ways of training in minutes."""

from typing import ClassVar, final

from dynarank.experiments.tasks._gpt import AbstractGPTTask


@final
class SmallGPTTask(AbstractGPTTask):
    """A GPT of two blocks, 128 wide, on one million characters of Shakespeare, trained by AdamW in bfloat16.

    Reference:
        Radford et al., "Language models are unsupervised multitask learners", 2019; the text is that of Karpathy's
        char-rnn, https://github.com/karpathy/char-rnn.
    """

    training_steps = 1000
    adamw: ClassVar = {"lr": 3e-3, "betas": (0.9, 0.95), "weight_decay": 0.0}
    sizes: ClassVar = {"layers": 2, "heads": 4, "width": 128, "context": 64}
    batch_size = 16
