"""A character-level GPT on tiny Shakespeare."""

from typing import ClassVar, final

from dynarank.experiments.tasks._gpt import AbstractGPTTask


@final
class GPTTask(AbstractGPTTask):
    """A GPT of four blocks, 192 wide, that predicts the next character of Shakespeare, trained by AdamW in bfloat16.

    Reference:
        Radford et al., "Language models are unsupervised multitask learners", 2019; the text is that of Karpathy's
        char-rnn, https://github.com/karpathy/char-rnn.
    """

    training_steps = 2400
    adamw: ClassVar = {"lr": 2e-3, "betas": (0.9, 0.98), "weight_decay": 0.1}
    sizes: ClassVar = {"layers": 4, "heads": 6, "width": 192, "context": 128}
    batch_size = 32
