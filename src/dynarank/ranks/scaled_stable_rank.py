"""The stable rank, scaled so that a random matrix has full rank: Cuttlefish's rule."""

from collections.abc import Sequence
from dataclasses import dataclass
from math import ceil

from dynarank.ranks._marchenko_pastur import edge
from dynarank.ranks.base import AbstractRankPolicy, Decision, LayerSpectrum, PlanContext, check_common, decide


@dataclass(frozen=True)
class ScaledStableRank(AbstractRankPolicy):
    """Keeps ``xi ||W||_F^2 / sigma_1^2`` directions, layer by layer: no tolerance to choose.

    The stable rank ``||W||_F^2 / sigma_1^2`` is far below the rank of a random matrix. ``xi`` makes up for that: it is
    the full rank over the stable rank of the layer at initialisation. Here that is the value of a large random
    ``(m, n)`` matrix, ``mn / (sqrt(m) + sqrt(n))^2``, so ``xi = (1 + sqrt(min(m, n) / max(m, n)))^2``, between 1 and 4.

    It measures how much the spectrum decays, not where noise ends. An untrained layer has full rank by construction,
    and ``r`` equal directions count as ``xi r``: meant for spectra that decay, and for a start at high rank, where it
    only cuts.

    Args:
        growth: Candidates to try at each event, as a fraction of the rank.
        min_rank: Smallest rank of a layer.

    Example:
        >>> ScaledStableRank().scale((64, 64)), ScaledStableRank().scale((16, 256))
        (4.0, 1.5625)

    Reference:
        Wang, Agarwal, U-chupala, Tanaka, Xing, Papailiopoulos, "Cuttlefish: low-rank model training without all the
        tuning", MLSys 2023, https://arxiv.org/abs/2305.02538. There ``xi`` is measured on the initial weight and the
        rank is set once, after full-rank epochs; here the rule is applied at every event.
    """

    growth: float = 0.5
    min_rank: int = 1

    def __post_init__(self) -> None:
        check_common(self, growth=self.growth, min_rank=self.min_rank)

    def plan(self, spectra: Sequence[LayerSpectrum], context: PlanContext) -> list[Decision]:
        """Return the scaled stable rank of each layer, rounded up."""
        return [self._decide(s) for s in spectra]

    def scale(self, shape: tuple[int, int]) -> float:
        """Return ``xi``, the full rank over the stable rank of a random matrix of ``shape``."""
        return edge(*shape) ** 2 / max(shape)

    def _decide(self, spectrum: LayerSpectrum) -> Decision:
        largest = float(spectrum.sigma[0])
        stable = float((spectrum.sigma / largest).square().sum()) if largest > 0 else 0.0
        rank = ceil(self.scale(spectrum.shape) * stable)
        return decide(spectrum, rank, growth=self.growth, min_rank=self.min_rank, reason=f"stable rank {stable:.3g}")
