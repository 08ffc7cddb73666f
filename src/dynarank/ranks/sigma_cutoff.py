"""A fraction of the largest singular value below which directions go: OIALR's rule."""

from collections.abc import Sequence
from dataclasses import dataclass
from math import floor

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
class SigmaCutoff(AbstractRankPolicy):
    """Keeps the singular values of at least ``beta`` times the largest, layer by layer, and cuts at most half at once.

    It compares with one number and knows of no noise. A fresh square matrix has singular values down to 0 and is cut
    before anything is learnt. The smallest of another shape is about ``(1 - q) / (1 + q)`` of the largest, with
    ``q = sqrt(min(m, n) / max(m, n))``, and where that is above ``beta`` the layer keeps its rank until training has
    lifted its largest (experiments/results/inrank_rule.md).

    Args:
        beta: Smallest singular value to keep, as a fraction of the largest; published: 0.1 to 0.2.
        largest_cut: Largest part of a layer's present rank that one event takes away, rounded up; 1 for no limit.
        growth: Candidates to try at each event, as a fraction of the rank; published: none.
        min_rank: Smallest rank of a layer; published: a hundredth of ``min(m, n)``.

    Example:
        >>> import torch
        >>> layer = LayerSpectrum("fc", torch.tensor([8.0, 2.0, 1.0, 0.5, 0.1, 0.1]).double(), (64, 48))
        >>> [SigmaCutoff(beta).plan([layer], PlanContext(0, 0, 0))[0].rank for beta in (0.01, 0.05, 0.2)]
        [6, 4, 3]

    Reference:
        Coquelin et al., "Harnessing orthogonality to train low-rank neural networks", 2024,
        https://arxiv.org/abs/2401.08505. The limit to a half is that of the published code.
    """

    beta: float = 0.15
    largest_cut: float = 0.5
    growth: float = 0.0
    min_rank: int = 1

    def __post_init__(self) -> None:
        check_common(self, growth=self.growth, min_rank=self.min_rank)
        check_fraction("SigmaCutoff", "beta", self.beta)
        if not 0 < self.largest_cut <= 1:
            raise ValueError(f"SigmaCutoff: largest_cut must be above 0 and at most 1, got {self.largest_cut}.")

    def plan(self, spectra: Sequence[LayerSpectrum], context: PlanContext) -> list[Decision]:
        """Return the number of singular values above the cutoff of each layer, or as near to it as one event may go."""
        return [self._decide(s) for s in spectra]

    def _decide(self, spectrum: LayerSpectrum) -> Decision:
        sigma = spectrum.sigma
        wanted = int(((sigma >= self.beta * sigma[0]) & (sigma > 0)).sum())
        present = min(spectrum.kept or len(sigma), len(sigma))  # candidates that did not pass are no cut
        least = floor((1 - self.largest_cut) * present + 1e-9)
        reason = f"sigma >= {self.beta:g} of the largest" if wanted >= least else f"on the way to {wanted}"
        return decide(spectrum, max(wanted, least), growth=self.growth, min_rank=self.min_rank, reason=reason)
