"""What a task is: a network, how it is trained and how well it does; all that compressing and judging it needs."""

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from dynarank.measure import call


@dataclass(frozen=True)
class Quality:
    """How well a network does.

    Args:
        loss: Mean loss.
        accuracy: Part of the samples that are classified correctly, or None where that is not counted.
    """

    loss: float
    accuracy: float | None = None


class AbstractTask(ABC):
    """A network with its data.

    A batch is whatever `forward` and `loss` understand, usually ``(inputs, targets)``. Data are loaded when they are
    first asked for.

    Args:
        data_dir: Folder with the data, where the usual folders are not meant.
    """

    measure = "accuracy"  # what a table shows: "accuracy" or "loss"
    training_steps: int  # of the network from scratch
    # Options of AdamW for whatever a method leaves to it: biases, norms, embeddings, the head, or all parameters.
    adamw: ClassVar[Mapping[str, Any]] = {"lr": 2e-3, "betas": (0.9, 0.99), "weight_decay": 0.0}

    def __init__(self, data_dir: str | None = None) -> None:
        self.data_dir = data_dir

    @abstractmethod
    def model(self) -> nn.Module:
        """Return the network, freshly initialised by torch's global generator."""

    @abstractmethod
    def narrower(self, parameters: int) -> nn.Module:
        """Return a narrower network of at most so many parameters, freshly initialised."""

    @abstractmethod
    def training_batches(self, seed: int, *, batch_size: int = ...) -> Iterator[Any]:  # type: ignore[assignment]
        """Yield training batches without end, augmented as the network wants them; of the usual size by default."""

    @abstractmethod
    def calibration_batches(self) -> list[Any]:
        """Return a few batches of training data, without augmentation."""

    @abstractmethod
    def optimizers(self, model: nn.Module) -> list[torch.optim.Optimizer]:
        """Return what trains the network from scratch, at its largest learning rates."""

    @abstractmethod
    def loss(self, outputs: Any, batch: Any) -> Tensor:
        """Return the mean loss of the outputs on a batch."""

    @abstractmethod
    def evaluate(self, model: nn.Module, part: str = "test") -> Quality:
        """Return how well a network does on ``"validation"`` or ``"test"``."""

    def forward(self, model: nn.Module, batch: Any) -> Any:
        """Return the outputs of a network in training; evaluation is in full precision."""
        return call(model, batch)


@torch.no_grad()
def classification_quality(model: nn.Module, inputs: Tensor, targets: Tensor, *, batch_size: int) -> Quality:
    """Return loss and accuracy of a classifier; its training flag is kept.

    Shape:
        inputs ``(N, *)``; targets ``(N, *)`` of class indices; outputs ``(N, *, classes)`` or, for images,
        ``(N, classes)``.
    """
    was_training = model.training
    model.eval()
    loss, correct = 0.0, 0
    for batch, wanted in zip(inputs.split(batch_size), targets.split(batch_size), strict=True):
        logits = model(batch).float().flatten(0, -2)
        loss += float(nn.functional.cross_entropy(logits, wanted.flatten(), reduction="sum"))
        correct += int((logits.argmax(-1) == wanted.flatten()).sum())
    model.train(was_training)
    return Quality(loss / targets.numel(), correct / targets.numel())
