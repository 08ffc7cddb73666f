"""Keeps what rises above noise: the edge of the spectrum of a fresh random layer of the same shape."""

from collections.abc import Sequence
from dataclasses import dataclass
from math import sqrt

from dynarank.ranks.base import AbstractRankPolicy, Decision, LayerSpectrum, PlanContext, candidates, check_common


@dataclass(frozen=True)
class NoiseEdge(AbstractRankPolicy):
    """Keeps the singular values above ``factor`` times the largest one of a freshly initialised layer.

    A random ``(m, n)`` matrix with entries of standard deviation ``s`` has its largest singular value near
    ``s (sqrt(m) + sqrt(n))`` (Marchenko and Pastur); torch draws ``s = 1 / sqrt(3 n)``. A direction counts as learned
    once it is stronger than anything an untrained layer contains, so an untrained layer is all noise.

    Args:
        factor: Threshold as a multiple of the edge.
        growth: Candidates to try at each event, as a fraction of the rank.
        min_rank: Smallest rank of a layer.

    Reference:
        Marchenko, Pastur, "Distribution of eigenvalues for some sets of random matrices", Math. USSR-Sbornik 1967;
        Martin, Mahoney, "Implicit self-regularization in deep neural networks", JMLR 2021,
        https://arxiv.org/abs/1810.01075.
    """

    factor: float = 1.0
    growth: float = 1.0
    min_rank: int = 1

    def __post_init__(self) -> None:
        check_common(self, growth=self.growth, min_rank=self.min_rank)
        if not self.factor > 0:
            raise ValueError(f"NoiseEdge: factor must be above 0, got {self.factor}.")

    def plan(self, spectra: Sequence[LayerSpectrum], context: PlanContext) -> list[Decision]:
        """Return the number of singular values above the edge, for each layer."""
        return [self._decide(s) for s in spectra]

    def edge(self, shape: tuple[int, int]) -> float:
        """Return the threshold for a weight of ``shape``."""
        m, n = shape
        return self.factor * (sqrt(m) + sqrt(n)) / sqrt(3 * n)

    def _decide(self, spectrum: LayerSpectrum) -> Decision:
        edge = self.edge(spectrum.shape)
        rank = min(max(int((spectrum.sigma > edge).sum()), self.min_rank), len(spectrum.sigma))
        return Decision(rank, candidates(rank, spectrum.max_rank, self.growth), f"above noise edge {edge:.3g}")
