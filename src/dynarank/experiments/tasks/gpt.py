"""A character-level GPT on tiny Shakespeare."""

from collections.abc import Iterator
from functools import cached_property
from typing import Any, ClassVar, final

import torch
from torch import Tensor, nn
from torch.nn import functional

from dynarank.data import CharacterText, all_blocks, load_tiny_shakespeare, random_blocks
from dynarank.experiments.tasks.base import AbstractTask, Quality, classification_quality
from dynarank.measure import call
from dynarank.models import GPT

BATCH, CONTEXT = 32, 128


@final
class GPTTask(AbstractTask):
    """A GPT of four blocks, 192 wide, that predicts the next character of Shakespeare, trained by AdamW in bfloat16.

    Reference:
        Radford et al., "Language models are unsupervised multitask learners", 2019; the text is that of Karpathy's
        char-rnn, https://github.com/karpathy/char-rnn.
    """

    measure = "loss"
    training_steps = 2400
    adamw: ClassVar = {"lr": 2e-3, "betas": (0.9, 0.98), "weight_decay": 0.1}

    @cached_property
    def text(self) -> CharacterText:
        """The text, with its last tenth for validation and test."""
        return load_tiny_shakespeare(self.data_dir)

    def model(self) -> nn.Module:
        return GPT(len(self.text.characters), layers=4, heads=6, width=192, context=CONTEXT)

    def narrower(self, parameters: int) -> nn.Module:
        return self.model().narrower(parameters)  # type: ignore[operator]

    def training_batches(self, seed: int, *, batch_size: int = BATCH) -> Iterator[Any]:
        generator = torch.Generator().manual_seed(seed)
        while True:
            yield random_blocks(self.text.train, CONTEXT, batch_size, generator)

    def calibration_batches(self) -> list[Any]:
        generator = torch.Generator().manual_seed(1)
        return [random_blocks(self.text.train, CONTEXT, BATCH, generator) for _ in range(8)]

    def optimizers(self, model: nn.Module) -> list[torch.optim.Optimizer]:
        return [torch.optim.AdamW(model.parameters(), **self.adamw)]

    def forward(self, model: nn.Module, batch: Any) -> Any:
        with torch.autocast("cpu", torch.bfloat16):
            return call(model, batch)

    def loss(self, outputs: Any, batch: Any) -> Tensor:
        return functional.cross_entropy(outputs.float().flatten(0, 1), batch[1].flatten())

    def evaluate(self, model: nn.Module, part: str = "test") -> Quality:
        tokens = {"validation": self.text.validation, "test": self.text.test}[part]
        inputs, targets = all_blocks(tokens, CONTEXT)
        return classification_quality(model, inputs, targets, batch_size=64)
