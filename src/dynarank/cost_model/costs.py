"""What a layer costs as a dense one, through its factors, or with ``W`` multiplied out: measured, or by a rule."""

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, replace
from math import floor
from typing import final

from dynarank.cost_model.work import FORMS, Form, Kind, Purpose, Stage, Work

Terms = tuple[float, float, float, float, float]  # seconds, as `terms` are counted

# (least rows * m * n, least min(m, n), largest rank as a fraction of mn / (m + n)) at which factors pay in training
TRAINING_RULE = ((3e7, 1, 0.85), (6e6, 1, 0.6), (2e6, 65, 0.4))
INFERENCE_RULE = (65, 0.8)  # least min(m, n), fraction
ROUNDING = 1e-9  # of a rank


class AbstractCosts(ABC):
    """Costs by which the forms of one layer are compared. Each is a straight line in the rank."""

    @abstractmethod
    def of(self, work: Work, purpose: Purpose) -> Mapping[Form, float]:
        """Return the cost of each form, in a unit that may differ from layer to layer."""

    @abstractmethod
    def seconds(self, work: Work, purpose: Purpose) -> Mapping[Form, float] | None:
        """Return the seconds of each form, or None where nothing was measured."""

    def break_even_rank(self, work: Work, purpose: Purpose) -> int:
        """Return the largest rank at which the layer is not slower through its factors than dense; 0 if none is."""
        dense, factored = self._line(work, purpose, "dense"), self._line(work, purpose, "factored")
        return _last(factored, dense, most=min(work.shape))

    def multiplies_out_from(self, work: Work, purpose: Purpose) -> int:
        """Return the rank from which on a layer that stays low-rank is faster with ``W`` multiplied out.

        Beyond ``min(m, n)`` where that never pays, as with few rows: the product of the factors costs ``mnr`` itself.
        """
        factored, multiplied = (self._line(work, purpose, form) for form in ("factored", "multiplied"))
        return _last(factored, multiplied, most=min(work.shape)) + 1

    def _line(self, work: Work, purpose: Purpose, form: Form) -> tuple[float, float]:
        """Return the cost of a form at rank 0, and what each rank adds."""
        at_0, at_1 = (self.of(replace(work, rank=rank), purpose)[form] for rank in (0, 1))
        return at_0, at_1 - at_0


def _last(one: tuple[float, float], other: tuple[float, float], *, most: int) -> int:
    """Return the largest rank up to ``most`` from which on one line lies above another; 0 if it does from the start."""
    ahead, loss = other[0] - one[0], one[1] - other[1]
    if loss <= 0:
        return most if loss < 0 or ahead >= 0 else 0
    return min(most, max(0, floor(ahead / loss + ROUNDING)))


@final
class RuleOfThumb(AbstractCosts):
    """Multiplications, with dense layers discounted: without any measurement on this machine.

    A layer is dense unless ``r <= f mn / (m + n)``. In training ``f`` is 0.85 for ``rows m n >= 3e7``, 0.6 for
    ``>= 6e6``, 0.4 for ``>= 2e6`` and more than 64 features on both sides, otherwise 0; in inference it is 0.8, and 0
    with 64 or fewer features on a side. These numbers were read off measurements of linear layers on one CPU.

    Example:
        >>> rule, work = RuleOfThumb(), Work("linear", (512, 512), rank=128, rows=128)
        >>> rule.break_even_rank(work, "training") / work.break_even
        0.84765625
    """

    def of(self, work: Work, purpose: Purpose) -> Mapping[Form, float]:
        """Return multiplications, those of a dense layer times ``f``."""
        counts: dict[Form, float] = {form: work.multiplications(form) for form in FORMS}
        counts["dense"] *= self.fraction(work, purpose)
        return counts

    def seconds(self, work: Work, purpose: Purpose) -> None:
        """Return None: a rule knows no times."""
        return

    @staticmethod
    def fraction(work: Work, purpose: Purpose) -> float:
        """Return the ``f`` of the rule."""
        (m, n), narrow = work.shape, min(work.shape)
        if purpose == "inference":
            least, fraction = INFERENCE_RULE
            return fraction if narrow >= least else 0.0
        size = work.rows * m * n
        return next((f for least, width, f in TRAINING_RULE if size >= least and narrow >= width), 0.0)


@final
@dataclass(frozen=True)
class MeasuredCosts(AbstractCosts):
    """Seconds by a model that was fitted to measurements.

    A product ``(rows, inner) (inner, outer)`` takes a time for the call itself, a time for each multiplication, and one
    for each number read or written: ``rows inner``, ``rows outer`` and ``outer inner``. Divided by the multiplications,
    the last three say how the rate falls where one of the dimensions is small.

    Args:
        operators: The five times in seconds, by purpose and operator, as `terms` orders them.

    Example:
        >>> from dynarank.cost_model.work import OPERATORS
        >>> alike = dict.fromkeys(OPERATORS, (5e-6, 1e-11, 0.0, 0.0, 0.0))
        >>> costs = MeasuredCosts({"inference": alike})
        >>> seconds = costs.seconds(Work("linear", (100, 100), rank=10, rows=100), "inference")
        >>> {form: f"{time:.1e}" for form, time in seconds.items()}
        {'dense': '1.5e-05', 'factored': '1.2e-05', 'multiplied': '2.1e-05'}
    """

    operators: Mapping[Purpose, Mapping[str, Terms]]

    def of(self, work: Work, purpose: Purpose) -> Mapping[Form, float]:
        """Return the seconds of each form."""
        return {form: self.of_form(work, purpose, form) for form in FORMS}

    def of_form(self, work: Work, purpose: Purpose, form: Form) -> float:
        """Return the seconds of one form."""
        times = self.operators[purpose]
        return work.calls * sum(_dot(times[stage.operator], terms(stage)) for stage in work.stages(form))

    def seconds(self, work: Work, purpose: Purpose) -> Mapping[Form, float]:
        """Return the seconds of each form."""
        return self.of(work, purpose)


@dataclass(frozen=True)
class Check:
    """How well times and decisions come out for shapes that the fit has not seen.

    Args:
        kind: Kind of layer.
        purpose: What the layers were timed for.
        layers: How many low-rank layers were looked at.
        median_error: Relative error of the predicted ratio of times, factored to dense: the median.
        worst_error: The largest.
        loss: Time lost by deciding between dense and factored by the fit, as a fraction of the best: the mean.
        rule_loss: The same for the rule of thumb.
    """

    kind: Kind
    purpose: Purpose
    layers: int
    median_error: float
    worst_error: float
    loss: float
    rule_loss: float


def terms(stage: Stage) -> Terms:
    """Return what the time of a product is a sum of: a call, its multiplications, inputs, outputs and weights.

    Example:
        >>> terms(Stage("linear", 20, 30, 100))
        (1, 60000, 3000, 2000, 600)
    """
    _, outer, inner, rows = stage
    return 1, rows * outer * inner, rows * inner, rows * outer, outer * inner


def _dot(times: Terms, counts: Terms) -> float:
    return sum(time * count for time, count in zip(times, counts, strict=True))
