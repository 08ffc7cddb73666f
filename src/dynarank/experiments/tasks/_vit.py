"""What the vision transformers on CIFAR-10 share: all but their sizes."""

from collections.abc import Iterator
from functools import cached_property
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional

from dynarank.data import Batches, DataSplits, crop_and_flip, load_cifar10
from dynarank.experiments.muon import Muon
from dynarank.experiments.tasks.base import AbstractTask, Quality, classification_quality
from dynarank.measure import call
from dynarank.models import ViT


class AbstractViTTask(AbstractTask):
    """CIFAR-10 with crop and flip, by Muon in bfloat16; a subclass gives the sizes.

    Attributes:
        sizes: Layers, heads and width of the transformer.
        batch_size: Images in a training batch.
    """

    adamw: ClassVar = {"lr": 1e-3, "betas": (0.9, 0.99), "weight_decay": 0.05}
    sizes: ClassVar[dict[str, int]]
    batch_size: ClassVar[int]

    @cached_property
    def splits(self) -> DataSplits:
        """The images; 5,000 of the 50,000 training images are for validation."""
        return load_cifar10(self.data_dir)

    def model(self) -> nn.Module:
        return ViT(**self.sizes)

    def narrower(self, parameters: int) -> nn.Module:
        return ViT(**self.sizes).narrower(parameters)

    def training_batches(self, seed: int, *, batch_size: int | None = None) -> Iterator[Any]:
        generator, size = torch.Generator().manual_seed(seed), batch_size or self.batch_size
        for images, labels in Batches(self.splits.train_inputs, self.splits.train_targets, size, generator):
            yield crop_and_flip(images, generator=generator), labels

    def calibration_batches(self) -> list[Any]:
        images, labels = self.splits.train_inputs[:1024], self.splits.train_targets[:1024]
        return list(zip(images.split(128), labels.split(128), strict=True))

    def optimizers(self, model: nn.Module) -> list[torch.optim.Optimizer]:
        matrices = [p for p in model.blocks.parameters() if p.dim() == 2]  # type: ignore[operator, union-attr]
        chosen = set(matrices)
        others = [p for p in model.parameters() if p not in chosen]
        return [Muon(matrices, lr=0.02, weight_decay=0.1), torch.optim.AdamW(others, **self.adamw)]

    def forward(self, model: nn.Module, batch: Any) -> Any:
        with torch.autocast(batch[0].device.type, torch.bfloat16):
            return call(model, batch)

    def loss(self, outputs: Any, batch: Any) -> Tensor:
        return functional.cross_entropy(outputs.float(), batch[1])

    def evaluate(self, model: nn.Module, part: str = "test") -> Quality:
        images, labels = self.splits.part(part)
        return classification_quality(model, images, labels, batch_size=500)
