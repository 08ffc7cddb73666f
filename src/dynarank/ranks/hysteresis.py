"""Ranks that do not flicker: a change smaller than a margin is not carried out."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from math import inf

from dynarank.ranks.base import AbstractRankPolicy, Decision, LayerSpectrum, PlanContext
from dynarank.ranks.relative_tail import RelativeTail


@dataclass(frozen=True)
class Hysteresis(AbstractRankPolicy):
    """Follows another policy only where it wants a rank beyond a margin around the present one.

    The present rank is what the last event kept, ``spectrum.kept``. Where that is not known, every direction of the
    layer counts, candidates included: exact for policies that try none. A budget may be exceeded by what is not
    pruned; wrap it with ``prune=0``.

    Args:
        policy: Policy that is followed, with its options.
        grow: Growth that is ignored: a whole number of directions, or a fraction of the present rank.
        prune: Shrinkage that is ignored, likewise.

    Example:
        >>> import torch
        >>> from dynarank.ranks.fixed import Fixed
        >>> layer = LayerSpectrum("fc", torch.ones(12).double(), (64, 48), kept=10)
        >>> policies = [Hysteresis(Fixed(rank), grow=2, prune=1) for rank in (8, 9, 12)]
        >>> [policy.plan([layer], PlanContext(0, 0, 0))[0].rank for policy in policies]
        [8, 10, 10]
    """

    policy: AbstractRankPolicy = field(default_factory=RelativeTail)
    grow: int | float = 0.1
    prune: int | float = 0.1

    def __post_init__(self) -> None:
        if not isinstance(self.policy, AbstractRankPolicy):
            raise TypeError(f"Hysteresis: policy must be an instance of a rank policy, got {self.policy!r}.")
        for name, margin in (("grow", self.grow), ("prune", self.prune)):
            if not 0 <= margin < inf:
                raise ValueError(f"Hysteresis: {name} must be at least 0 and finite, got {margin}.")

    def plan(self, spectra: Sequence[LayerSpectrum], context: PlanContext) -> list[Decision]:
        """Return what the policy wants, or the present rank where that is near."""
        wanted = self.policy.plan(spectra, context)
        return [self._decide(s, d) for s, d in zip(spectra, wanted, strict=True)]

    def _decide(self, spectrum: LayerSpectrum, wanted: Decision) -> Decision:
        present = min(spectrum.kept or len(spectrum.sigma), len(spectrum.sigma))
        low, high = present - _directions(self.prune, present), present + _directions(self.grow, present)
        if wanted.rank == present or not low <= wanted.rank <= high:
            return wanted
        tried = min(wanted.candidates, spectrum.max_rank - present)
        return Decision(present, tried, f"stays: {wanted.rank} is near")


def _directions(margin: int | float, rank: int) -> float:
    return margin if isinstance(margin, int) else margin * rank
