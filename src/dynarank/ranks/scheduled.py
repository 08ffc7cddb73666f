"""An option of a policy that follows the step: a tolerance that tightens, a fraction that falls."""

from collections.abc import Sequence
from dataclasses import dataclass, field, fields, is_dataclass, replace
from math import inf

from dynarank.ranks.base import AbstractRankPolicy, Decision, LayerSpectrum, PlanContext
from dynarank.ranks.relative_tail import RelativeTail


@dataclass(frozen=True)
class Scheduled(AbstractRankPolicy):
    """Follows another policy, one option of which goes from ``begin`` to ``end`` over the first ``over`` steps.

    Args:
        policy: Policy that is followed; its other options stay.
        option: Name of the option, which must be a number. Whole numbers are rounded.
        begin: Value at step 0.
        end: Value from step ``over`` on.
        over: Steps that it takes.
        power: Shape of the way: ``end + (begin - end) (1 - step / over)^power``, so 1 is linear, 3 the cubic of gradual
            pruning.

    Example:
        >>> policy = Scheduled(RelativeTail(), option="tolerance", begin=0.5, end=0.1, over=100)
        >>> [round(policy.at(step).tolerance, 3) for step in (0, 50, 100, 999)]
        [0.5, 0.3, 0.1, 0.1]

    Reference:
        The cubic: Zhu, Gupta, "To prune, or not to prune", 2017, https://arxiv.org/abs/1710.01878.
    """

    policy: AbstractRankPolicy = field(default_factory=RelativeTail)
    option: str = "tolerance"
    begin: float = 0.3
    end: float = 0.1
    over: int = 1000
    power: float = 1.0

    def __post_init__(self) -> None:
        if not isinstance(self.policy, AbstractRankPolicy):
            raise TypeError(f"Scheduled: policy must be an instance of a rank policy, got {self.policy!r}.")
        numbers = _numbers(self.policy)
        if self.option not in numbers:
            kind = type(self.policy).__name__
            raise ValueError(
                f"Scheduled: option must be a number of {kind}, one of {', '.join(numbers) or 'none'}; "
                f"got {self.option!r}."
            )
        if self.over < 1 or not 0 < self.power < inf:
            raise ValueError(f"Scheduled: over must be at least 1 and power above 0, got {self.over} and {self.power}.")
        for step in (0, self.over):
            self.at(step)  # the policy itself says what is wrong with a value

    def plan(self, spectra: Sequence[LayerSpectrum], context: PlanContext) -> list[Decision]:
        """Return what the policy wants with the option's value at this step."""
        return self.at(context.step).plan(spectra, context)

    def at(self, step: int) -> AbstractRankPolicy:
        """Return the policy in force at ``step``."""
        left = max(0.0, 1 - step / self.over) ** self.power
        value = self.end + (self.begin - self.end) * left
        whole = isinstance(getattr(self.policy, self.option), int)
        return replace(self.policy, **{self.option: round(value) if whole else value})  # type: ignore[type-var]


def _numbers(policy: AbstractRankPolicy) -> list[str]:
    """Return the options of a policy whose values are numbers."""
    names = [f.name for f in fields(policy) if f.init] if is_dataclass(policy) else []
    values = [(name, getattr(policy, name)) for name in names]
    return [name for name, value in values if isinstance(value, int | float) and not isinstance(value, bool)]
