"""What every rank policy is: a function from the spectra of all layers to a rank and a reason for each."""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from math import ceil, inf

from torch import Tensor

from dynarank import cost


@dataclass(frozen=True)
class LayerSpectrum:
    """What a policy sees of one layer.

    Args:
        name: Qualified name of the layer.
        sigma: Singular values of its weight, descending, float64 on the CPU; candidates included.
        shape: Shape ``(m, n)`` of its weight matrix.
        own_rank: Rank outside a cycle of its integrator, where the bases are augmented now; None elsewhere.
        kept: Rank that the last event kept, before it added candidates; None where that is not known.
        price: Numbers that a direction takes, where it is not a row of each of two factors.
    """

    name: str
    sigma: Tensor
    shape: tuple[int, int]
    own_rank: int | None = None
    kept: int | None = None
    price: float | None = None

    def parameters(self, rank: int) -> int:
        """Return the numbers that a rank takes as deployed."""
        return cost.deployed_parameters(*self.shape, rank) if self.price is None else ceil(self.price * rank)

    @property
    def max_rank(self) -> int:
        """Largest possible rank."""
        return min(self.shape)


@dataclass(frozen=True)
class PlanContext:
    """What a policy knows about the run.

    Args:
        step: Optimizer steps taken.
        dense_parameters: Entries of every tensor of the dense model.
        other_parameters: Entries of everything that is not a factor: heads, biases, norms, buffers.
    """

    step: int
    dense_parameters: int
    other_parameters: int


@dataclass(frozen=True)
class Decision:
    """A rank for one layer, how many new directions to try on top of it, and why.

    Pruning and growing are separate: ``rank`` is what the layer keeps, ``candidates`` are trained until the next
    event and then have to earn their place.
    """

    rank: int
    candidates: int
    reason: str


class AbstractRankPolicy(ABC):
    """Plans ranks: sees all layers at once and returns one decision for each, in the same order."""

    @abstractmethod
    def plan(self, spectra: Sequence[LayerSpectrum], context: PlanContext) -> list[Decision]:
        """Return a decision for each layer. Pure: the same spectra give the same plan on every process."""


def candidates(rank: int, max_rank: int, growth: float) -> int:
    """Return how many directions to try on top of ``rank``: a fraction of it, at least one unless ``growth`` is 0.

    Example:
        >>> candidates(3, 100, 0.5), candidates(3, 4, 1.0), candidates(3, 100, 0.0)
        (2, 1, 0)
    """
    wanted = max(1, round(rank * growth)) if growth > 0 else 0
    return min(wanted, max_rank - rank)


def decide(spectrum: LayerSpectrum, rank: int, *, growth: float, min_rank: int, reason: str) -> Decision:
    """Return the decision for one layer: ``rank`` within what there is, and the candidates on top of it."""
    kept = min(max(rank, min_rank), len(spectrum.sigma))
    return Decision(kept, candidates(kept, spectrum.max_rank, growth), reason)


def check_common(policy: object, *, growth: float, min_rank: int) -> None:
    """Raise unless ``growth`` and ``min_rank``, which most policies have, are in range."""
    owner = type(policy).__name__
    if not 0 <= growth < inf:
        raise ValueError(f"{owner}: growth must be at least 0 and finite, got {growth}.")
    if min_rank < 1:
        raise ValueError(f"{owner}: min_rank must be at least 1, got {min_rank}.")


def check_fraction(owner: str, name: str, value: float) -> None:
    """Raise unless ``value`` lies between 0 and 1, both excluded."""
    if not 0 < value < 1:
        raise ValueError(f"{owner}: {name} must be between 0 and 1, got {value}.")
