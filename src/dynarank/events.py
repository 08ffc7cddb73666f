"""The rank event as data: what changed, where, by how much, and why."""

from dataclasses import asdict, dataclass
from typing import Any


@dataclass(frozen=True)
class RankEvent:
    """One layer's part in a rank event.

    Args:
        step: Number of optimizer steps taken when the ranks changed.
        layer: Qualified name of the layer, as in ``model.named_modules()``.
        old_rank: Rank before the event, candidate directions included.
        new_rank: Rank kept by the policy.
        candidates: New directions added on top of ``new_rank``; they train until the next event and then compete.
        tail: Discarded part of the spectrum, ``||sigma[new_rank:]||_2 / ||sigma||_2``; 0 when nothing was cut.
        reason: One short phrase from the rank policy, or why the event was postponed.

    Example:
        >>> event = RankEvent(step=25, layer="fc1", old_rank=8, new_rank=5, candidates=0, tail=0.01, reason="budget")
        >>> event.as_dict()["new_rank"]
        5
    """

    step: int
    layer: str
    old_rank: int
    new_rank: int
    candidates: int
    tail: float
    reason: str

    def as_dict(self) -> dict[str, Any]:
        """Return the event as a plain dictionary that JSON can hold."""
        return asdict(self)
