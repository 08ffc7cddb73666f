"""The task of a run: data, the dense network, the loss, and how well a network does."""

import math
from dataclasses import dataclass
from typing import Any, final

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dynarank import data, models
from dynarank.data import DataSplits
from dynarank.experiments.config import TrainConfig

EVALUATION_BATCH = 1000


@dataclass(frozen=True)
class Quality:
    """How well a network does on a part of the data.

    Args:
        loss: Mean loss.
        accuracy: Part of the samples that are classified correctly; None for regression.
    """

    loss: float
    accuracy: float | None


@final
@dataclass(frozen=True)
class Problem:
    """Data and network of a complete configuration.

    Args:
        config: The configuration, completed.
        splits: The data, on the device of this process.
    """

    config: TrainConfig
    splits: DataSplits

    @classmethod
    def load(cls, config: TrainConfig, device: torch.device | str | None = None) -> "Problem":
        """Load the data of a complete configuration.

        Args:
            config: The configuration, completed.
            device: Where the data go; that of the configuration by default.

        Raises:
            ValueError: If the data are not where they should be, or a planted rank is out of range.
            RuntimeError: If the data cannot be downloaded.
            ImportError: If the loader needs a package that is not installed.
        """
        options: dict[str, Any] = {}
        if config.data == "synthetic":
            options = {"rank": config.planted_rank, "noise": config.noise, "seed": config.seed}
        return cls(config, data.load(config.data, directory=config.data_dir, **options).to(device or config.device))

    @property
    def device(self) -> torch.device:
        """Where data and networks are."""
        return self.splits.train_inputs.device

    @property
    def measure(self) -> str:
        """What tells the quality of a network: ``"accuracy"`` or, for regression, ``"loss"``."""
        return "loss" if self.splits.classes is None else "accuracy"

    def build(self) -> nn.Module:
        """Build the dense network with initial weights that depend on the seed alone."""
        config = self.config
        options = {"hidden": config.hidden} if config.model == "mlp" else {}
        torch.manual_seed(config.seed)
        model = models.build(str(config.model), self.splits.input_shape, self.splits.outputs, **options)
        return model.to(self.device)

    def build_narrower(self, parameters: int) -> nn.Module:
        """Build a narrower dense network of at most ``parameters`` parameters, its weights by the seed alone.

        Raises:
            ValueError: If the network has no width, or not one unit per layer fits.
        """
        model = self.build()
        if not isinstance(model, models.MLP | models.LeNet5):
            raise ValueError(f"{self.config.model} has no width, so there is no narrower one.")
        torch.manual_seed(self.config.seed)
        return model.narrower(parameters).to(self.device)

    def loss(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """Return the mean loss of a batch: cross-entropy, or the mean square for regression."""
        if self.splits.classes is None:
            return F.mse_loss(outputs, targets)
        return F.cross_entropy(outputs, targets)

    def correct(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """Return the number of samples classified correctly; 0 for regression."""
        if self.splits.classes is None:
            return torch.zeros((), dtype=torch.int64)
        return (outputs.detach().argmax(dim=1) == targets).sum()

    @torch.no_grad()
    def evaluate(self, model: nn.Module, part: str) -> Quality:
        """Return the quality of a network on ``"validation"`` or ``"test"``; it is left in training mode."""
        inputs, targets = self.splits.part(part)
        loss, correct = 0.0, 0
        model.eval()
        for batch, wanted in zip(inputs.split(EVALUATION_BATCH), targets.split(EVALUATION_BATCH), strict=True):
            outputs = model(batch)
            loss += len(batch) * float(self.loss(outputs, wanted))
            correct += int(self.correct(outputs, wanted))
        model.train()
        samples = max(1, len(inputs))
        return Quality(loss / samples, None if self.splits.classes is None else correct / samples)

    def score(self, quality: Quality) -> float:
        """Return the measure of a quality: its accuracy or its loss."""
        return quality.loss if quality.accuracy is None else quality.accuracy

    def better(self, one: float, other: float) -> bool:
        """Whether the first value of the measure is better than the second; any is better than NaN."""
        if math.isnan(other):
            return not math.isnan(one)
        return one < other if self.splits.classes is None else one > other
