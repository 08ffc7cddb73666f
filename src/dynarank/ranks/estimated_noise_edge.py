"""Keeps what rises above noise, with the level of the noise taken from the weakest directions of the layer itself."""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from dynarank.ranks._marchenko_pastur import spectrum as noise_spectrum
from dynarank.ranks.base import AbstractRankPolicy, Decision, LayerSpectrum, PlanContext, check_common, decide
from dynarank.ranks.noise_edge import NoiseEdge

BULK = 4  # fewest singular values that the level of the noise is estimated from


@dataclass(frozen=True)
class EstimatedNoiseEdge(AbstractRankPolicy):
    """Keeps the singular values above ``margin`` times the edge of the noise that the layer shows.

    If ``p`` directions are signal, the others are the largest of the noise's, and their Marchenko-Pastur quantiles give
    its level as the median of ``sigma[p + j] / quantile[j]``: the estimate of Gavish and Donoho, for a spectrum that
    shows its top only. Kept is the largest ``p`` whose last direction stands above ``margin`` times the edge of that
    noise and the next one does not.

    A low-rank layer shows noise only in its candidates, so every event tries at least ``probes`` of them. What this
    cannot see: candidates that are all signal look like candidates that are all noise. Hence whatever is above
    ``factor`` times the edge of a fresh random layer counts as signal too, as in `NoiseEdge`; that alone decides where
    no noise is visible (fewer than 4 directions below the signal, no candidates). So noise that lifts directions
    above it is taken for signal, and signal that stays below it while it fills all probes is taken for noise.

    Args:
        margin: How far above the estimated edge signal stands. Candidates have had one interval to grow and old
            directions many, so it is well above 1.
        probes: Fewest candidates to try at each event; none if ``growth`` is 0.
        factor: Fraction of the edge of a fresh random layer above which everything counts, once training has settled.
        settle: Steps until then, as in `NoiseEdge`.
        growth: Candidates to try at each event, as a fraction of the rank.
        min_rank: Smallest rank of a layer.

    Reference:
        Gavish, Donoho, "The optimal hard threshold for singular values is 4/sqrt(3)", IEEE Trans. Inf. Theory 2014,
        https://arxiv.org/abs/1305.5870. There all singular values are visible and the median of all is taken.
    """

    margin: float = 2.0
    probes: int = 8
    factor: float = 0.6
    settle: int = 200
    growth: float = 1.0
    min_rank: int = 1

    def __post_init__(self) -> None:
        check_common(self, growth=self.growth, min_rank=self.min_rank)
        if not self.margin >= 1:
            raise ValueError(f"EstimatedNoiseEdge: margin must be at least 1, got {self.margin}.")
        if self.probes < 0:
            raise ValueError(f"EstimatedNoiseEdge: probes must be at least 0, got {self.probes}.")
        if not self.factor > 0:
            raise ValueError(f"EstimatedNoiseEdge: factor must be above 0, got {self.factor}.")
        if self.settle < 1:
            raise ValueError(f"EstimatedNoiseEdge: settle must be at least 1, got {self.settle}.")

    def plan(self, spectra: Sequence[LayerSpectrum], context: PlanContext) -> list[Decision]:
        """Return the number of singular values above the noise, for each layer."""
        return [self._decide(s, context.step) for s in spectra]

    def signals(self, sigma: Tensor, shape: tuple[int, int]) -> int:
        """Return how many of the largest singular values stand above the noise that the others show, 0 if none do."""
        m, n = shape
        for p in range(len(sigma) - BULK, 0, -1):
            expected = noise_spectrum(m - p, n - p)[: len(sigma) - p]
            level = torch.quantile(sigma[p:] / expected, 0.5)
            threshold = self.margin * level * expected[0]
            if sigma[p - 1] > threshold >= sigma[p]:
                return p
        return 0

    def _decide(self, spectrum: LayerSpectrum, step: int) -> Decision:
        seen = self.signals(spectrum.sigma, spectrum.shape)
        fresh = NoiseEdge(factor=self.factor, settle=self.settle).threshold(spectrum.shape, step)
        large = int((spectrum.sigma > fresh).sum())
        reason = "above the noise it shows" if seen > large else f"above noise {fresh:.3g}"
        found = decide(spectrum, max(seen, large), growth=self.growth, min_rank=self.min_rank, reason=reason)
        if self.growth == 0:
            return found
        return replace(found, candidates=min(max(found.candidates, self.probes), spectrum.max_rank - found.rank))
