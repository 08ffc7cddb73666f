"""The same part of full rank for every layer: Pufferfish's rule."""

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
class Fraction(AbstractRankPolicy):
    """Cuts every layer to a fixed part of full rank, whatever its spectrum, and never grows.

    A square layer breaks even at a half, one of 4:1 at four fifths.

    Args:
        part: Rank to keep, as a fraction of ``min(m, n)``, rounded down.
        min_rank: Smallest rank of a layer.

    Example:
        >>> import torch
        >>> layer = LayerSpectrum("fc", torch.ones(48).double(), (64, 48))
        >>> Fraction(0.25).plan([layer], PlanContext(0, 0, 0))[0].rank
        12

    Reference:
        Wang, Agarwal, Papailiopoulos, "Pufferfish: communication-efficient models at no extra cost", MLSys 2021,
        https://arxiv.org/abs/2103.03936: a quarter, after some epochs with full rank; the first layers and the head
        stay dense.
    """

    part: float = 0.25
    min_rank: int = 1

    def __post_init__(self) -> None:
        check_common(self, growth=0.0, min_rank=self.min_rank)
        check_fraction("Fraction", "part", self.part)

    def plan(self, spectra: Sequence[LayerSpectrum], context: PlanContext) -> list[Decision]:
        """Return the part of each layer's full rank, or what it has where that is less."""
        return [self._decide(s) for s in spectra]

    def _decide(self, spectrum: LayerSpectrum) -> Decision:
        rank = floor(self.part * spectrum.max_rank + 1e-9)
        reason = f"{self.part:g} of full rank"
        return decide(spectrum, rank, growth=0.0, min_rank=self.min_rank, reason=reason)
