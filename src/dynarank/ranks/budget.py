"""A budget of parameters for the whole model, shared out by what each direction is worth."""

from collections.abc import Sequence
from dataclasses import dataclass
from math import ceil, floor

import torch

from dynarank import cost, linalg
from dynarank.ranks.base import (
    AbstractRankPolicy,
    Decision,
    LayerSpectrum,
    PlanContext,
    candidates,
    check_common,
    check_fraction,
)


@dataclass(frozen=True)
class Budget(AbstractRankPolicy):
    """Keeps the deployed model within a fraction of the dense parameters by one relative tail for all layers.

    The common tolerance ``theta`` is the smallest for which truncating every layer to a tail of
    ``theta * ||sigma||_2`` fits the budget; what is then left is filled up with the next best directions. A layer at
    or above its break-even rank counts as dense, so its further directions are free.

    Args:
        fraction: Deployed parameters allowed, as a fraction of the dense model's (every tensor counts).
        start: Fraction allowed at step 0; the budget falls from it to ``fraction`` along a cubic. Needs ``steps``.
        steps: Step at which ``fraction`` is reached. Needs ``start``.
        growth: Candidates to try at each event, as a fraction of the rank.
        min_rank: Smallest rank of a layer.

    Raises:
        ValueError: The budget does not even hold the parameters outside the factors plus ``min_rank`` everywhere.
    """

    fraction: float
    start: float | None = None
    steps: int = 0
    growth: float = 1.0
    min_rank: int = 2

    def __post_init__(self) -> None:
        check_common(self, growth=self.growth, min_rank=self.min_rank)
        check_fraction("Budget", "fraction", self.fraction)
        if self.start is not None and not self.fraction <= self.start <= 1:
            raise ValueError(f"Budget: start must be between fraction = {self.fraction} and 1, got {self.start}.")
        if self.steps < 0 or (self.start is None) != (self.steps == 0):
            raise ValueError(
                "Budget: steps must be at least 1 with start and 0 without, "
                f"got steps = {self.steps} and start = {self.start}."
            )

    def allowed(self, step: int) -> float:
        """Return the fraction of the dense parameters allowed at ``step``."""
        if self.start is None or step >= self.steps:
            return self.fraction
        return self.fraction + (self.start - self.fraction) * (1 - step / self.steps) ** 3

    def plan(self, spectra: Sequence[LayerSpectrum], context: PlanContext) -> list[Decision]:
        """Return the ranks of the common tolerance that fits."""
        fraction = self.allowed(context.step)
        room = floor(fraction * context.dense_parameters + 1e-6) - context.other_parameters  # 0.29 * 100 < 29
        ranks = self._share(spectra, room, context)
        reason = f"budget {fraction:.1%}"
        return [
            Decision(r, candidates(r, s.max_rank, self.growth), reason) for s, r in zip(spectra, ranks, strict=True)
        ]

    def _share(self, spectra: Sequence[LayerSpectrum], room: int, context: PlanContext) -> list[int]:
        ranks = [min(self.min_rank, len(s.sigma)) for s in spectra]
        spent = sum(cost.deployed_parameters(*s.shape, r) for s, r in zip(spectra, ranks, strict=True))
        if spent > room:
            need = ceil(1e4 * (spent + context.other_parameters) / context.dense_parameters) / 1e4
            raise ValueError(
                f"Budget: {context.dense_parameters} dense parameters leave {room} for the factors, but rank "
                f"{self.min_rank} everywhere takes {spent}. Allow at least {need:.2%} or lower min_rank."
            )
        # Offer directions by falling relative tail: that is one common theta, lowered until the budget is spent.
        offers = []
        for index, s in enumerate(spectra):
            relative = linalg.tails(s.sigma) / s.sigma.norm().clamp_min(torch.finfo(torch.float64).tiny)
            offers += [(float(relative[r]), index, r) for r in range(ranks[index], len(s.sigma))]
        closed = set()
        for _, index, r in sorted(offers, key=lambda offer: (-offer[0], offer[1], offer[2])):
            m, n = spectra[index].shape
            price = cost.deployed_parameters(m, n, r + 1) - cost.deployed_parameters(m, n, r)
            if index in closed or spent + price > room:
                closed.add(index)  # a layer's directions are taken in order
                continue
            ranks[index], spent = r + 1, spent + price
        return ranks
