"""VGG-16 on CIFAR-10."""

from collections.abc import Iterator
from functools import cached_property
from typing import Any, final

import torch
from torch import Tensor, nn
from torch.nn import functional

from dynarank.data import Batches, DataSplits, crop_and_flip, load_cifar10
from dynarank.experiments.muon import Muon
from dynarank.experiments.tasks.base import AbstractTask, Quality, classification_quality
from dynarank.measure import call
from dynarank.models import VGG16

BATCH = 256


@final
class VGG16Task(AbstractTask):
    """VGG-16 with BatchNorm on CIFAR-10 with crop and flip, trained by Muon in bfloat16 autocast.

    Reference:
        Simonyan, Zisserman, "Very deep convolutional networks for large-scale image recognition", ICLR 2015,
        https://arxiv.org/abs/1409.1556.
    """

    training_steps = 16 * 175

    @cached_property
    def splits(self) -> DataSplits:
        """The images; 5,000 of the 50,000 training images are for validation."""
        return load_cifar10(self.data_dir)

    def model(self) -> nn.Module:
        return VGG16().to(memory_format=torch.channels_last)  # type: ignore[call-overload]

    def narrower(self, parameters: int) -> nn.Module:
        with torch.device("meta"):
            whole = VGG16()
        return whole.narrower(parameters).to(memory_format=torch.channels_last)  # type: ignore[call-overload]

    def training_batches(self, seed: int, *, batch_size: int = BATCH) -> Iterator[Any]:
        generator = torch.Generator().manual_seed(seed)
        for images, labels in Batches(self.splits.train_inputs, self.splits.train_targets, batch_size, generator):
            yield _channels_last(crop_and_flip(images, generator=generator)), labels

    def calibration_batches(self) -> list[Any]:
        images, labels = self.splits.train_inputs[:2048], self.splits.train_targets[:2048]
        return [(_channels_last(x), y) for x, y in zip(images.split(256), labels.split(256), strict=True)]

    def optimizers(self, model: nn.Module) -> list[torch.optim.Optimizer]:
        head = set(model.head.parameters())  # type: ignore[operator, union-attr]
        filters = [p for p in model.parameters() if p.dim() > 1 and p not in head]
        others = [p for p in model.parameters() if p.dim() == 1 or p in head]
        return [Muon(filters, lr=0.05, weight_decay=0.1), torch.optim.AdamW(others, **self.adamw)]

    def forward(self, model: nn.Module, batch: Any) -> Any:
        with torch.autocast(batch[0].device.type, torch.bfloat16):
            return call(model, batch)

    def loss(self, outputs: Any, batch: Any) -> Tensor:
        return functional.cross_entropy(outputs.float(), batch[1])

    def evaluate(self, model: nn.Module, part: str = "test") -> Quality:
        images, labels = self.splits.part(part)
        return classification_quality(model, images, labels, batch_size=500)


def _channels_last(images: Tensor) -> Tensor:
    return images.contiguous(memory_format=torch.channels_last)
