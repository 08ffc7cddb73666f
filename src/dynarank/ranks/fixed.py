"""Ranks that stay as they are."""

from collections.abc import Sequence
from dataclasses import dataclass

from dynarank.ranks.base import AbstractRankPolicy, Decision, LayerSpectrum, PlanContext


@dataclass(frozen=True)
class Fixed(AbstractRankPolicy):
    """Keeps every rank as it is, or sets all layers to one rank.

    Args:
        rank: Rank for every layer, capped by its size; None keeps what ``factorize_`` chose.
    """

    rank: int | None = None

    def __post_init__(self) -> None:
        if self.rank is not None and self.rank < 1:
            raise ValueError(f"Fixed: rank must be at least 1, got {self.rank}.")

    def plan(self, spectra: Sequence[LayerSpectrum], context: PlanContext) -> list[Decision]:
        """Return the rank unchanged, or cut to ``rank``."""
        return [Decision(min(len(s.sigma), self.rank or s.own_rank or len(s.sigma)), 0, "fixed") for s in spectra]
