"""What every switch is: it looks at dense weights while they train, and says which are ready to go low-rank."""

from abc import ABC, abstractmethod
from collections.abc import Mapping

from torch import Tensor

State = dict[str, Tensor]


class AbstractSwitch(ABC):
    """Says when a layer that started with full rank becomes low-rank.

    What it remembers is plain data that the caller keeps, so that an interrupted run goes on with it.
    """

    @abstractmethod
    def looks(self, step: int) -> bool:
        """Whether the weights are to be shown after ``step`` optimizer steps: a look may cost an SVD a layer."""

    def init(self) -> State:
        """Return what is remembered before the first look."""
        return {}

    @abstractmethod
    def look(self, step: int, weights: Mapping[str, Tensor], state: State) -> tuple[frozenset[str], State]:
        """Return the layers that are ready, and what to remember.

        Args:
            step: Optimizer steps taken.
            weights: By layer its dense weight as a matrix ``(m, n)``, in at least float32. Layers that are ready
                are left out from then on.
            state: What the last look returned.
        """
