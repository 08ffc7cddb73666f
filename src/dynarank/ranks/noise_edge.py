"""Keeps what rises above noise: the edge of the spectrum of a fresh random layer of the same shape."""

from collections.abc import Sequence
from dataclasses import dataclass
from math import sqrt

from dynarank.ranks.base import AbstractRankPolicy, Decision, LayerSpectrum, PlanContext, check_common, decide


@dataclass(frozen=True)
class NoiseEdge(AbstractRankPolicy):
    """Keeps the singular values above a fraction of the largest one of a freshly initialised layer.

    A random ``(m, n)`` matrix with entries of standard deviation ``s`` has its largest singular value near
    ``s (sqrt(m) + sqrt(n))`` (Marchenko and Pastur); torch draws ``s = 1 / sqrt(3 n)``. At step 0 only what rises above
    that edge counts, so an untrained layer is all noise. Training pulls the random start down to the noise of the data,
    and with it the threshold falls to ``factor`` times the edge.

    The noise of the data is not estimated: targets much noisier than the signal need a larger ``factor``.

    Args:
        factor: Threshold after ``settle`` steps, as a fraction of the edge.
        settle: Steps after which the random start counts as trained away; the threshold falls linearly until then.
        growth: Candidates to try at each event, as a fraction of the rank.
        min_rank: Smallest rank of a layer.

    Reference:
        Marchenko, Pastur, "Distribution of eigenvalues for some sets of random matrices", Math. USSR-Sbornik 1967;
        Martin, Mahoney, "Implicit self-regularization in deep neural networks", JMLR 2021,
        https://arxiv.org/abs/1810.01075.
    """

    factor: float = 0.4
    settle: int = 200
    growth: float = 1.0
    min_rank: int = 1

    def __post_init__(self) -> None:
        check_common(self, growth=self.growth, min_rank=self.min_rank)
        if not self.factor > 0:
            raise ValueError(f"NoiseEdge: factor must be above 0, got {self.factor}.")
        if self.settle < 1:
            raise ValueError(f"NoiseEdge: settle must be at least 1, got {self.settle}.")

    def plan(self, spectra: Sequence[LayerSpectrum], context: PlanContext) -> list[Decision]:
        """Return the number of singular values above the threshold, for each layer."""
        return [self._decide(s, context.step) for s in spectra]

    def threshold(self, shape: tuple[int, int], step: int) -> float:
        """Return the smallest singular value that counts, for a weight of ``shape`` after ``step`` steps."""
        m, n = shape
        trained = min(1.0, step / self.settle)
        return (1 + (self.factor - 1) * trained) * (sqrt(m) + sqrt(n)) / sqrt(3 * n)

    def _decide(self, spectrum: LayerSpectrum, step: int) -> Decision:
        least = self.threshold(spectrum.shape, step)
        rank = int((spectrum.sigma > least).sum())
        reason = f"above noise {least:.3g}"
        return decide(spectrum, rank, growth=self.growth, min_rank=self.min_rank, reason=reason)
