"""What every budget of parameters does: directions of all layers, best first, until the model is full."""

from abc import abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from math import ceil, floor

from torch import Tensor

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
class AbstractBudget(AbstractRankPolicy):
    """Keeps the deployed model within a fraction of the dense parameters; what a direction is worth is left open.

    A layer at or above its break-even rank counts as dense, so its further directions are free.
    """

    fraction: float
    start: float | None = None
    steps: int = 0
    growth: float = 1.0
    min_rank: int = 2

    def __post_init__(self) -> None:
        owner = type(self).__name__
        check_common(self, growth=self.growth, min_rank=self.min_rank)
        check_fraction(owner, "fraction", self.fraction)
        if self.start is not None and not self.fraction <= self.start <= 1:
            raise ValueError(f"{owner}: start must be between fraction = {self.fraction} and 1, got {self.start}.")
        if self.steps < 0 or (self.start is None) != (self.steps == 0):
            raise ValueError(
                f"{owner}: steps must be at least 1 with start and 0 without, "
                f"got steps = {self.steps} and start = {self.start}."
            )

    @abstractmethod
    def worth(self, spectrum: LayerSpectrum) -> Tensor:
        """Return what each direction is worth, one number per singular value, not rising."""

    def allowed(self, step: int) -> float:
        """Return the fraction of the dense parameters allowed at ``step``."""
        if self.start is None or step >= self.steps:
            return self.fraction
        return self.fraction + (self.start - self.fraction) * (1 - step / self.steps) ** 3

    def plan(self, spectra: Sequence[LayerSpectrum], context: PlanContext) -> list[Decision]:
        """Return the ranks of the most valuable directions that fit."""
        fraction = self.allowed(context.step)
        room = floor(fraction * context.dense_parameters + 1e-6) - context.other_parameters  # 0.29 * 100 < 29
        ranks = self._share(spectra, room, context)
        reason = f"budget {fraction:.1%}"
        return [
            Decision(r, candidates(r, s.max_rank, self.growth), reason) for s, r in zip(spectra, ranks, strict=True)
        ]

    def _share(self, spectra: Sequence[LayerSpectrum], room: int, context: PlanContext) -> list[int]:
        ranks = [min(self.min_rank, len(s.sigma)) for s in spectra]
        spent = sum(s.parameters(r) for s, r in zip(spectra, ranks, strict=True))
        if spent > room:
            need = ceil(1e4 * (spent + context.other_parameters) / context.dense_parameters) / 1e4
            raise ValueError(
                f"{type(self).__name__}: {context.dense_parameters} dense parameters leave {room} for the factors, but "
                f"rank {self.min_rank} everywhere takes {spent}. Allow at least {need:.2%} or lower min_rank."
            )
        offers = []
        for index, s in enumerate(spectra):
            worth = self.worth(s).cummin(0).values.tolist()  # rounding may let it rise; directions are taken in order
            offers += [(worth[r], index, r) for r in range(ranks[index], len(s.sigma))]
        closed = set()
        for _, index, r in sorted(offers, key=lambda offer: (-offer[0], offer[1], offer[2])):
            price = spectra[index].parameters(r + 1) - spectra[index].parameters(r)
            if index in closed or spent + price > room:
                closed.add(index)  # a layer's directions are taken in order
                continue
            ranks[index], spent = r + 1, spent + price
        return ranks
