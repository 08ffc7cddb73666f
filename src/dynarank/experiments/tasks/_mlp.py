"""What the multilayer perceptrons on MNIST share: all but the width."""

from collections.abc import Iterator
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from dynarank.data import Batches, DataSplits, load_mnist
from dynarank.experiments.muon import Muon
from dynarank.experiments.tasks.base import AbstractTask, Quality, classification_quality
from dynarank.models import MLP

BATCH, DEPTH = 128, 4


class AbstractMLPTask(AbstractTask):
    """Four hidden layers of one width on MNIST; a subclass says which."""

    width: int
    training_steps = 10 * 430

    @cached_property
    def splits(self) -> DataSplits:
        """The images; 5,000 of the 60,000 training images are for validation."""
        return load_mnist(self.data_dir)

    def model(self) -> nn.Module:
        return self._whole()

    def narrower(self, parameters: int) -> nn.Module:
        with torch.device("meta"):
            whole = self._whole()
        return whole.narrower(parameters)

    def training_batches(self, seed: int, *, batch_size: int = BATCH) -> Iterator[Any]:
        generator = torch.Generator().manual_seed(seed)
        return Batches(self.splits.train_inputs, self.splits.train_targets, batch_size, generator)

    def calibration_batches(self) -> list[Any]:
        images, labels = self.splits.train_inputs[:4096], self.splits.train_targets[:4096]
        return list(zip(images.split(512), labels.split(512), strict=True))

    def optimizers(self, model: nn.Module) -> list[torch.optim.Optimizer]:
        head = set(model.head.parameters())  # type: ignore[operator, union-attr]
        matrices = [p for p in model.parameters() if p.dim() > 1 and p not in head]
        others = [p for p in model.parameters() if p.dim() == 1 or p in head]
        return [Muon(matrices, lr=0.02, weight_decay=0.1), torch.optim.AdamW(others, **self.adamw)]

    def loss(self, outputs: Any, batch: Any) -> Tensor:
        return functional.cross_entropy(outputs, batch[1])

    def evaluate(self, model: nn.Module, part: str = "test") -> Quality:
        images, labels = self.splits.part(part)
        return classification_quality(model, images, labels, batch_size=1000)

    def _whole(self) -> MLP:
        return MLP(784, (self.width,) * DEPTH, 10)
