"""Rank events at equal distances, until ranks freeze."""

from dataclasses import dataclass

from dynarank.schedules.base import AbstractSchedule, Moment


@dataclass(frozen=True)
class Periodic(AbstractSchedule):
    """A rank event every ``every`` steps after ``start``; the last one at ``freeze``, after which ranks stay.

    Args:
        every: Optimizer steps between rank events.
        start: No event up to this step.
        freeze: Step of the last event: candidates are dropped and ranks stay. None: ranks never freeze by themselves.

    Example:
        >>> schedule = Periodic(every=10, freeze=25)
        >>> [schedule.moment(step) for step in (9, 10, 25, 30)]
        ['none', 'event', 'last', 'none']
    """

    every: int = 25
    start: int = 0
    freeze: int | None = None

    def __post_init__(self) -> None:
        if self.every < 1 or self.start < 0:
            raise ValueError(
                f"Periodic: every must be at least 1 and start at least 0, got {self.every} and {self.start}."
            )
        if self.freeze is not None and self.freeze <= self.start:
            raise ValueError(
                f"Periodic: freeze must come after start = {self.start}, got {self.freeze}: no event ever."
            )

    def moment(self, step: int) -> Moment:
        """Return what happens after ``step`` steps."""
        if self.freeze is not None and step >= self.freeze:
            return "last" if step == self.freeze else "none"
        return "event" if step > self.start and (step - self.start) % self.every == 0 else "none"
