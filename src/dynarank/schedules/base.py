"""What every schedule is: a function from the step count to what happens after that step."""

from abc import ABC, abstractmethod
from typing import Literal

Moment = Literal["none", "event", "last"]


class AbstractSchedule(ABC):
    """Says after which optimizer steps ranks change."""

    @abstractmethod
    def moment(self, step: int) -> Moment:
        """Return what happens after ``step`` steps: nothing, a rank event, or the last one before ranks freeze."""
