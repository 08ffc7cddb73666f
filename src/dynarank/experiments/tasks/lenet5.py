"""LeNet5 on MNIST."""

from collections.abc import Iterator
from functools import cached_property
from typing import Any, final

import torch
from torch import Tensor, nn
from torch.nn import functional

from dynarank.data import Batches, DataSplits, load_mnist
from dynarank.experiments.tasks.base import AbstractTask, Quality, classification_quality
from dynarank.models import LeNet5

BATCH = 128


@final
class LeNet5Task(AbstractTask):
    """LeNet5 on MNIST, trained by stochastic gradient descent.

    Reference:
        LeCun, Bottou, Bengio, Haffner, "Gradient-based learning applied to document recognition", 1998,
        https://doi.org/10.1109/5.726791.
    """

    training_steps = 10 * 430

    @cached_property
    def splits(self) -> DataSplits:
        """The images; 5,000 of the 60,000 training images are for validation."""
        return load_mnist(self.data_dir)

    def model(self) -> nn.Module:
        return LeNet5()

    def narrower(self, parameters: int) -> nn.Module:
        return LeNet5().narrower(parameters)

    def training_batches(self, seed: int, *, batch_size: int = BATCH) -> Iterator[Any]:
        generator = torch.Generator().manual_seed(seed)
        return Batches(self.splits.train_inputs, self.splits.train_targets, batch_size, generator)

    def calibration_batches(self) -> list[Any]:
        images, labels = self.splits.train_inputs[:4096], self.splits.train_targets[:4096]
        return list(zip(images.split(512), labels.split(512), strict=True))

    def optimizers(self, model: nn.Module) -> list[torch.optim.Optimizer]:
        return [torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9, nesterov=True, weight_decay=5e-4)]

    def loss(self, outputs: Any, batch: Any) -> Tensor:
        return functional.cross_entropy(outputs, batch[1])

    def evaluate(self, model: nn.Module, part: str = "test") -> Quality:
        images, labels = self.splits.part(part)
        return classification_quality(model, images, labels, batch_size=1000)
