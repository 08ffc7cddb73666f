"""Truncation to an absolute tolerance: weak layers lose more directions than strong ones."""

from collections.abc import Sequence
from dataclasses import dataclass

from dynarank import linalg
from dynarank.ranks.base import AbstractRankPolicy, Decision, LayerSpectrum, PlanContext, check_common, decide


@dataclass(frozen=True)
class AbsoluteTail(AbstractRankPolicy):
    """Keeps the smallest rank whose tail ``||sigma[r:]||_2`` is at most ``tolerance``, layer by layer.

    The tolerance is a noise level that it is told: noise of a larger norm is kept as signal. An untrained layer has
    norm ``sqrt(m / 3)``, far above it, and keeps its rank.

    Args:
        tolerance: Largest ``||W - W_r||_F`` allowed, in the units of the weight.
        growth: Candidates to try at each event, as a fraction of the rank.
        min_rank: Smallest rank of a layer.

    Reference:
        Schotthöfer et al., "Low-rank lottery tickets", NeurIPS 2022, https://arxiv.org/abs/2205.13571 (the absolute
        variant of the truncation).
    """

    tolerance: float = 0.1
    growth: float = 1.0
    min_rank: int = 1

    def __post_init__(self) -> None:
        check_common(self, growth=self.growth, min_rank=self.min_rank)
        if not self.tolerance > 0:
            raise ValueError(f"AbsoluteTail: tolerance must be above 0, got {self.tolerance}.")

    def plan(self, spectra: Sequence[LayerSpectrum], context: PlanContext) -> list[Decision]:
        """Return the rank of each layer by its own tail."""
        return [self._decide(s) for s in spectra]

    def _decide(self, spectrum: LayerSpectrum) -> Decision:
        rank = linalg.rank_for_tail(spectrum.sigma, self.tolerance)
        reason = f"tail <= {self.tolerance:g}"
        return decide(spectrum, rank, growth=self.growth, min_rank=self.min_rank, reason=reason)
