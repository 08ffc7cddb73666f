"""A fixed step for all layers."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import final

from torch import Tensor

from dynarank.switches.base import AbstractSwitch, State


@final
@dataclass(frozen=True)
class AtStep(AbstractSwitch):
    """All layers are ready after a number of steps, whatever their weights.

    Args:
        delay: Optimizer steps with full rank.

    Example:
        >>> import torch
        >>> AtStep(100).look(100, {"fc": torch.eye(3)}, {})[0]
        frozenset({'fc'})

    Reference:
        Coquelin et al., "Harnessing orthogonality to train low-rank neural networks", 2024,
        https://arxiv.org/abs/2401.08505.
    """

    delay: int

    def __post_init__(self) -> None:
        if self.delay < 0:
            raise ValueError(f"AtStep: delay must be at least 0, got {self.delay}.")

    def looks(self, step: int) -> bool:
        return step >= self.delay

    def look(self, step: int, weights: Mapping[str, Tensor], state: State) -> tuple[frozenset[str], State]:
        return (frozenset(weights) if step >= self.delay else frozenset()), state
