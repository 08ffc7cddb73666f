"""Truncation to a share of the energy, the sum of squared singular values."""

from collections.abc import Sequence
from dataclasses import dataclass

from dynarank import linalg
from dynarank.ranks.base import (
    AbstractRankPolicy,
    Decision,
    LayerSpectrum,
    PlanContext,
    check_common,
    check_fraction,
    decide,
)


@dataclass(frozen=True)
class RetainedEnergy(AbstractRankPolicy):
    """Keeps the smallest rank that holds a fraction ``energy`` of ``sum(sigma^2)``, layer by layer.

    The same family as ``RelativeTail`` with ``tolerance = sqrt(1 - energy)``, in the words of principal components.
    Like it, it needs a spectrum that decays, and takes pure noise for signal.

    Args:
        energy: Fraction of the squared Frobenius norm to keep.
        growth: Candidates to try at each event, as a fraction of the rank.
        min_rank: Smallest rank of a layer.

    Reference:
        Eckart, Young, "The approximation of one matrix by another of lower rank", Psychometrika 1936,
        https://doi.org/10.1007/BF02288367.
    """

    energy: float = 0.99
    growth: float = 1.0
    min_rank: int = 1

    def __post_init__(self) -> None:
        check_common(self, growth=self.growth, min_rank=self.min_rank)
        check_fraction("RetainedEnergy", "energy", self.energy)

    def plan(self, spectra: Sequence[LayerSpectrum], context: PlanContext) -> list[Decision]:
        """Return the rank of each layer by its own energy."""
        return [self._decide(s) for s in spectra]

    def _decide(self, spectrum: LayerSpectrum) -> Decision:
        rank = linalg.rank_for_tail(spectrum.sigma, (1 - self.energy) ** 0.5 * float(spectrum.sigma.norm()))
        reason = f"energy >= {self.energy:g}"
        return decide(spectrum, rank, growth=self.growth, min_rank=self.min_rank, reason=reason)
