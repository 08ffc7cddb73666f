"""The variance among the singular values that a rank explains: InRank's rule, for comparison."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from dynarank.ranks.base import (
    AbstractRankPolicy,
    Decision,
    LayerSpectrum,
    PlanContext,
    check_common,
    check_fraction,
)


@dataclass(frozen=True)
class VarianceRatio(AbstractRankPolicy):
    """Grows to the smallest rank ``r`` with ``1 - Var(sigma - sigma_r) / Var(sigma)`` above a threshold; never shrinks.

    ``sigma`` are all ``min(m, n)`` singular values, zeros included, and ``sigma_r`` the same with zeros from ``r`` on.
    Candidates are a buffer of fixed size, and one event grows by less than that buffer.

    Published as it is here, and kept for comparison only: **it takes noise for signal**. The variance is about the
    mean, so the rank answers to how even the spectrum is and not to how much of the weight is explained, and whatever
    the untrained buffer holds counts like what has been learnt. In the shapes of GPT-2 an untrained layer grows to a
    quarter or a third of full rank (experiments/results/inrank_rule.md). `SignalEnergy` is the rule corrected.

    Args:
        explained: Smallest ratio, between 0 and 1.
        buffer: Candidates to try at each event, as far as they fit.
        min_rank: Rank below which no layer goes, and where one starts whose rank is not known.

    Reference:
        Zhao, Zhang, Chen, Schäfer, Anandkumar, "InRank: incremental low-rank learning", 2023,
        https://arxiv.org/abs/2306.11250, its efficient variant. There no more than half of full rank is allowed; here
        that is `Capped(VarianceRatio(), 0.5)`.
    """

    explained: float = 0.9
    buffer: int = 100
    min_rank: int = 2

    def __post_init__(self) -> None:
        check_common(self, growth=0.0, min_rank=self.min_rank)
        check_fraction("VarianceRatio", "explained", self.explained)
        if self.buffer < 1:
            raise ValueError(f"VarianceRatio: buffer must be at least 1, got {self.buffer}.")

    def plan(self, spectra: Sequence[LayerSpectrum], context: PlanContext) -> list[Decision]:
        """Return the present rank of each layer or the one that explains enough, whichever is larger."""
        return [self._decide(s) for s in spectra]

    def ratio(self, sigma: Tensor, rank: int, max_rank: int) -> float:
        """Return the part of the variance among ``max_rank`` singular values that the first ``rank`` explain."""
        scaled = sigma.new_zeros(max_rank)
        scaled[: len(sigma)] = sigma / sigma[0].clamp_min(torch.finfo(sigma.dtype).tiny)
        tail = scaled.clone()
        tail[:rank] = 0
        total = float(scaled.var(correction=0))
        return 1 - float(tail.var(correction=0)) / total if total > 0 else 1.0

    def _decide(self, spectrum: LayerSpectrum) -> Decision:
        available, present = len(spectrum.sigma), max(spectrum.kept or 0, self.min_rank)
        last = max(present, available - 1)
        ratios = (self.ratio(spectrum.sigma, rank, spectrum.max_rank) for rank in range(present, last))
        rank = next((r for r, ratio in enumerate(ratios, present) if ratio > self.explained), last)
        rank = min(rank, available)
        reason = f"variance >= {self.explained:g}"
        return Decision(rank, min(self.buffer, spectrum.max_rank - rank), reason)
