"""What the character-level GPTs on tiny Shakespeare share: all but their sizes."""

from collections.abc import Iterator
from functools import cached_property
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional

from dynarank.data import CharacterText, all_blocks, load_tiny_shakespeare, random_blocks
from dynarank.experiments.tasks.base import AbstractTask, Quality, classification_quality
from dynarank.measure import call
from dynarank.models import GPT


class AbstractGPTTask(AbstractTask):
    """Next-character prediction of Shakespeare by AdamW in bfloat16; a subclass gives the sizes.

    Attributes:
        sizes: Layers, heads, width and context of the GPT.
        batch_size: Blocks of text in a training batch.
    """

    measure = "loss"
    sizes: ClassVar[dict[str, int]]
    batch_size: ClassVar[int]

    @cached_property
    def text(self) -> CharacterText:
        """The text, with its last tenth for validation and test."""
        return load_tiny_shakespeare(self.data_dir)

    def model(self) -> nn.Module:
        return GPT(len(self.text.characters), **self.sizes)

    def narrower(self, parameters: int) -> nn.Module:
        return self.model().narrower(parameters)  # type: ignore[operator]

    def training_batches(self, seed: int, *, batch_size: int | None = None) -> Iterator[Any]:
        generator = torch.Generator().manual_seed(seed)
        while True:
            yield random_blocks(self.text.train, self.sizes["context"], batch_size or self.batch_size, generator)

    def calibration_batches(self) -> list[Any]:
        generator = torch.Generator().manual_seed(1)
        return [random_blocks(self.text.train, self.sizes["context"], self.batch_size, generator) for _ in range(8)]

    def optimizers(self, model: nn.Module) -> list[torch.optim.Optimizer]:
        return [torch.optim.AdamW(model.parameters(), **self.adamw)]

    def forward(self, model: nn.Module, batch: Any) -> Any:
        with torch.autocast(batch[0].device.type, torch.bfloat16):
            return call(model, batch)

    def loss(self, outputs: Any, batch: Any) -> Tensor:
        return functional.cross_entropy(outputs.float().flatten(0, 1), batch[1].flatten())

    def evaluate(self, model: nn.Module, part: str = "test") -> Quality:
        tokens = {"validation": self.text.validation, "test": self.text.test}[part]
        inputs, targets = all_blocks(tokens, self.sizes["context"])
        return classification_quality(model, inputs, targets, batch_size=64)
