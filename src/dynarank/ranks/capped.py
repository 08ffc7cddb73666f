"""A largest rank for every layer, whatever the policy wants."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from math import floor

from dynarank.ranks.base import AbstractRankPolicy, Decision, LayerSpectrum, PlanContext
from dynarank.ranks.noise_edge import NoiseEdge


@dataclass(frozen=True)
class Capped(AbstractRankPolicy):
    """Follows another policy up to a largest rank.

    The cap holds for what an event keeps. Candidates come on top until the next event, in the policy's proportion to
    the rank: at the cap they compete with what is there.

    Args:
        policy: Policy that is followed, with its options.
        largest: Largest rank: a whole number, or a fraction of ``min(m, n)`` between 0 and 1, rounded down but at
            least 1.

    Example:
        >>> import torch
        >>> layer = LayerSpectrum("fc", torch.full((20,), 9.0).double(), (64, 48))
        >>> [Capped(largest=largest).plan([layer], PlanContext(0, 0, 0))[0].rank for largest in (6, 0.25)]
        [6, 12]
    """

    policy: AbstractRankPolicy = field(default_factory=NoiseEdge)
    largest: int | float = 0.25

    def __post_init__(self) -> None:
        if not isinstance(self.policy, AbstractRankPolicy):
            raise TypeError(f"Capped: policy must be an instance of a rank policy, got {self.policy!r}.")
        if not (self.largest >= 1 if isinstance(self.largest, int) else 0 < self.largest <= 1):
            raise ValueError(
                "Capped: largest must be a whole number of at least 1 or a fraction between 0 and 1, "
                f"got {self.largest}."
            )

    def plan(self, spectra: Sequence[LayerSpectrum], context: PlanContext) -> list[Decision]:
        """Return what the policy wants, cut to the cap of each layer."""
        wanted = self.policy.plan(spectra, context)
        return [self._decide(s, d) for s, d in zip(spectra, wanted, strict=True)]

    def cap(self, max_rank: int) -> int:
        """Return the largest rank of a layer whose shape allows ``max_rank``."""
        return self.largest if isinstance(self.largest, int) else max(1, floor(self.largest * max_rank + 1e-9))

    def _decide(self, spectrum: LayerSpectrum, wanted: Decision) -> Decision:
        cap = self.cap(spectrum.max_rank)
        if wanted.rank <= cap:
            return wanted
        tried = -(-wanted.candidates * cap // wanted.rank)
        return Decision(cap, tried, f"at most {cap}; {wanted.reason}")
