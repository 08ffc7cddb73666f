"""Truncation to a tolerance relative to the weight's own norm: the rule of dynamical low-rank training."""

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
class RelativeTail(AbstractRankPolicy):
    """Keeps the smallest rank whose tail is at most ``tolerance * ||sigma||_2``, layer by layer.

    It needs a spectrum that decays below the tolerance. On a flat one, noise's among them, it keeps nearly everything,
    and as long as all candidates pass, the rank grows.

    Args:
        tolerance: Largest ``||W - W_r||_F`` allowed, as a fraction of ``||W||_F``.
        growth: Candidates to try at each event, as a fraction of the rank.
        min_rank: Smallest rank of a layer.

    Reference:
        Schotthöfer et al., "Low-rank lottery tickets", NeurIPS 2022, https://arxiv.org/abs/2205.13571, algorithm 1.
    """

    tolerance: float = 0.1
    growth: float = 1.0
    min_rank: int = 1

    def __post_init__(self) -> None:
        check_common(self, growth=self.growth, min_rank=self.min_rank)
        check_fraction("RelativeTail", "tolerance", self.tolerance)

    def plan(self, spectra: Sequence[LayerSpectrum], context: PlanContext) -> list[Decision]:
        """Return the rank of each layer by its own tail."""
        return [self._decide(s) for s in spectra]

    def _decide(self, spectrum: LayerSpectrum) -> Decision:
        rank = linalg.rank_for_tail(spectrum.sigma, self.tolerance * float(spectrum.sigma.norm()))
        reason = f"tail <= {self.tolerance:g} ||W||"
        return decide(spectrum, rank, growth=self.growth, min_rank=self.min_rank, reason=reason)
