"""Losses that draw the outputs of a compressed network to those of the network before."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, final

from torch import Tensor
from torch.nn import functional

from dynarank.linalg import widen

Distance = Callable[[Any, Any], Tensor]  # outputs of the student, outputs of the teacher -> a loss


@final
@dataclass(frozen=True)
class SoftTargets:
    """The Kullback-Leibler divergence of softened class probabilities, for networks that return logits.

    Args:
        temperature: What logits are divided by on both sides; above 1 the small probabilities count more. The loss is
            multiplied by its square, which keeps the size of the gradient.

    Shape:
        Logits ``(*, classes)`` of student and teacher.

    Raises:
        ValueError: The temperature is not positive.

    Example:
        >>> import torch
        >>> round(SoftTargets()(torch.tensor([[0.0, 0.0]]), torch.tensor([[0.0, 2.0]])).item(), 4)
        0.4438

    Reference:
        Hinton, Vinyals, Dean, "Distilling the knowledge in a neural network", 2015, https://arxiv.org/abs/1503.02531.
    """

    temperature: float = 2.0

    def __post_init__(self) -> None:
        if not self.temperature > 0:
            raise ValueError(f"SoftTargets: temperature must be above 0, got {self.temperature}.")

    def __call__(self, student: Tensor, teacher: Tensor) -> Tensor:
        rows = (widen(y).reshape(-1, y.shape[-1]) / self.temperature for y in (student, teacher))
        now, wanted = (functional.log_softmax(row, -1) for row in rows)
        return self.temperature**2 * functional.kl_div(now, wanted, log_target=True, reduction="batchmean")


def cosine_distance(student: Tensor, teacher: Tensor) -> Tensor:
    """Return the mean of 1 - cosine between embeddings.

    Shape:
        ``(*, features)`` each.

    Example:
        >>> import torch
        >>> cosine_distance(torch.tensor([[1.0, 0.0]]), torch.tensor([[0.0, 5.0]])).item()
        1.0
    """
    return 1 - functional.cosine_similarity(widen(student), widen(teacher), dim=-1).mean()
