"""What a contestant is: how a network is made and what trains it. Everything else is the same for all of them."""

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import ClassVar

import torch
from torch import nn

from dynarank.experiments.tasks.base import AbstractTask
from dynarank.report.formats import percent


@dataclass(frozen=True)
class Size:
    """How small a network is to be: one of these.

    Args:
        fraction: Part of the parameters of the dense network.
        rank: Rank of every layer.
        tolerance: Relative tail of every layer that may be cut.
        policy: Name of a rank policy, with its options: ``"noise_edge"``, ``"retained_energy:energy=0.99"``.

    Example:
        >>> Size(fraction=0.05).label, Size(rank=20).label
        ('5.0 %', 'rank 20')
    """

    fraction: float | None = None
    rank: int | None = None
    tolerance: float | None = None
    policy: str | None = None

    @property
    def label(self) -> str:
        """What a table calls it."""
        if self.fraction is not None:
            return percent(self.fraction)
        if self.rank is not None:
            return f"rank {self.rank}"
        return f"tail {self.tolerance:g}" if self.tolerance is not None else str(self.policy)


@dataclass(frozen=True)
class Setting:
    """What one training is given.

    Args:
        lr: Largest learning rate, in the convention of the contestant.
        steps: Optimizer steps.
        size: How small the network is to be; None for contestants without sizes.
        parameters: What the low-rank networks of this size store; None where nobody knows yet.
        ranks: Ranks that the network ended with, where only the cost of a step at these is asked for; else empty.
    """

    lr: float
    steps: int
    size: Size | None = None
    parameters: int | None = None
    ranks: Mapping[str, int] = field(default_factory=dict)


class AbstractContestant(ABC):
    """A way to make and train a network for a task: one file in this folder, found by its name.

    Batches, their order, the number of steps, warm-up, decay and evaluation are the same for all contestants, and every
    contestant is tuned over as many learning rates.
    """

    sized: ClassVar[bool] = True  # whether there is a network for each size, or one alone
    follows: ClassVar[bool] = False  # whether its size is a number of parameters that low-rank networks set

    @abstractmethod
    def lr(self, task: AbstractTask) -> float:
        """Return the learning rate about which to look for the best."""

    @abstractmethod
    def network(self, task: AbstractTask, setting: Setting) -> nn.Module:
        """Return the network, freshly initialised by torch's global generator.

        Raises:
            ValueError: There is none of that size.
        """

    @abstractmethod
    def optimizers(self, task: AbstractTask, model: nn.Module, setting: Setting) -> list[torch.optim.Optimizer]:
        """Return what trains the network, at its largest learning rates.

        A step calls all of them. Rank events that a `LowRankOptimizer` holds within the steps are its own business.
        """
