"""The smallest model whose score is still good enough: a search over the budget, on copies."""

import copy
import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from dynarank.compress.compress import Compressor
from dynarank.compress.plan import Plan
from dynarank.compress.report import CompressionReport
from dynarank.measure import evaluating

ROUNDING = 1e-6  # of a score: 97.3 % less 1 % is 96.3 %, in float32 as well

Score = Callable[[nn.Module], float]


@dataclass(frozen=True)
class Trial:
    """One size that was looked at.

    Args:
        fraction: Cost after, as a fraction of the cost before.
        score: The score at this size; the model as it is has fraction 1.
        tolerated: Whether that is good enough.
    """

    fraction: float
    score: float
    tolerated: bool


@dataclass(frozen=True)
class Tolerated:
    """What ``compress_to_tolerance_`` found. ``print(found)`` shows the table and the sizes that were tried.

    Args:
        report: What was done to the model.
        trials: Every size that was scored, in that order; the model as it was first.
    """

    report: CompressionReport
    trials: tuple[Trial, ...]

    def __str__(self) -> str:
        tried = ", ".join(f"{t.fraction:.1%} {t.score:.4g}{'' if t.tolerated else ' (too bad)'}" for t in self.trials)
        return f"{self.report}\nSizes tried and their scores: {tried}."


def compress_to_tolerance_(
    model: nn.Module,
    evaluate: Score,
    tolerance: float,
    *,
    higher_is_better: bool = True,
    measure: str = "parameters",
    calibration: Iterable[Any] | None = None,
    precision: float = 0.01,
    faster_only: bool = False,
    renew_statistics: bool | None = None,
    timed: float | None = None,
    tell: Callable[[Trial], None] | None = None,
    **options: Any,
) -> Tolerated:
    """Compress a trained model in place as far as its score allows, by bisection over the budget.

    The layers are looked at once. Every size is tried on a copy, so there are up to three models in memory, and the
    model itself is changed at the very end. Bisection takes it that less budget means a worse score; a score that
    jumps about may end it at a size that is not the smallest. Score on data that you do not report on afterwards.

    Args:
        model: Any trained module with layers inside.
        evaluate: Returns the score of a model, given in evaluation mode without gradients; it must not change it.
        tolerance: What may be lost: of a score that should be high the difference, such as 0.01 of accuracy; of one
            that should be low, such as a loss, the part by which it may grow.
        higher_is_better: Whether the score should be high.
        measure: What the budget counts, as in ``compress_``.
        calibration: Batches of representative data, as in ``compress_``.
        precision: The search ends when the budget is known to this part of what the model costs.
        faster_only: As in ``compress_``.
        renew_statistics: As in ``compress_``.
        timed: As in ``compress_``.
        tell: Called after every size that was scored.
        options: Further options of `Compressor`.

    Raises:
        ValueError: No size is good enough, the score of the model is not finite, ``tolerance`` or ``precision`` is out
            of range, or `Compressor` refuses. The model is unchanged.

    Example:
        >>> model = nn.Sequential(nn.Linear(40, 40), nn.ReLU(), nn.Linear(40, 5))
        >>> _ = model[0].weight.data.copy_(torch.randn(40, 3) @ torch.randn(3, 40))  # of rank 3
        >>> x = torch.randn(200, 40)
        >>> classes = model(x).argmax(1)
        >>> found = compress_to_tolerance_(model, lambda m: float((m(x).argmax(1) == classes).float().mean()), 0.1)
        >>> found.report.parameters_before, found.report.parameters_after, found.report.compressed[0].rank
        (1845, 485, (3,))
    """
    _check(tolerance, precision)
    if timed is None and (faster_only or measure == "latency"):
        timed = 0.05
    # The survey holds on to a copy, so that moments are always those of the model before, whatever is applied to it.
    compressor = Compressor(copy.deepcopy(model), calibration=calibration, timed=timed, **options)
    search = _Search(compressor, evaluate, measure, faster_only, renew_statistics, tell)
    plan = search.smallest(_limit(search.score_of(model), tolerance, higher_is_better), precision=precision)
    search.apply_(plan, model)
    return Tolerated(plan.report, tuple(search.trials))


class _Search:
    """Tries plans on copies of the model."""

    def __init__(
        self,
        compressor: Compressor,
        evaluate: Score,
        measure: str,
        faster_only: bool,
        renew_statistics: bool | None,
        tell: Callable[[Trial], None] | None,
    ) -> None:
        self.compressor, self.evaluate, self.tell = compressor, evaluate, tell
        self.measure, self.faster_only, self.renew_statistics = measure, faster_only, renew_statistics
        self.trials: list[Trial] = []

    def score_of(self, model: nn.Module) -> float:
        """Return the score of the model as it is."""
        score = self._score(model)
        if not math.isfinite(score):
            raise ValueError(f"compress_to_tolerance_: the score of the model must be finite, got {score}.")
        self._note(Trial(1.0, score, True))
        return score

    def smallest(self, allowed: Callable[[float], bool], *, precision: float) -> Plan:
        """Return the plan of the smallest cost whose score is allowed."""
        self._plan(1.0)  # whatever is wrong with the arguments is told here; below, a ValueError means: too tight
        low, high, best = 0.0, 1.0, None
        while high - low > precision:
            middle = (low + high) / 2
            try:
                plan = self._plan(middle)
            except ValueError:
                low = middle
                continue
            fraction = plan.report.cost_after / plan.report.cost_before
            if self._try(plan, fraction, allowed):
                high, best = min(middle, fraction), plan
            else:
                low = middle
        if best is None:
            raise ValueError(_nothing(self.trials))
        return best

    def apply_(self, plan: Plan, model: nn.Module) -> None:
        """Carry out a plan on a model that is as the one that was surveyed."""
        self.compressor.apply_(plan, model=model, renew_statistics=self.renew_statistics)

    def _score(self, model: nn.Module) -> float:
        with torch.no_grad(), evaluating(model):
            return float(self.evaluate(model))

    def _plan(self, fraction: float) -> Plan:
        return self.compressor.plan(fraction, measure=self.measure, faster_only=self.faster_only)

    def _try(self, plan: Plan, fraction: float, allowed: Callable[[float], bool]) -> bool:
        candidate = copy.deepcopy(self.compressor.model)
        self.apply_(plan, candidate)
        score = self._score(candidate)
        self._note(Trial(fraction, score, allowed(score)))
        return self.trials[-1].tolerated

    def _note(self, trial: Trial) -> None:
        self.trials.append(trial)
        if self.tell is not None:
            self.tell(trial)


def _limit(score: float, tolerance: float, higher_is_better: bool) -> Callable[[float], bool]:
    """Return whether a score is good enough, but for rounding; NaN is not."""
    rounding = ROUNDING * abs(score)
    if higher_is_better:
        return lambda other: other >= score - tolerance - rounding
    return lambda other: other <= score + tolerance * abs(score) + rounding


def _check(tolerance: float, precision: float) -> None:
    if not tolerance >= 0:
        raise ValueError(f"tolerance must be at least 0, got {tolerance}.")
    if not 0 < precision < 1:
        raise ValueError(f"precision must be between 0 and 1, got {precision}.")


def _nothing(trials: list[Trial]) -> str:
    start, *others = trials
    if not others:
        return "compress_to_tolerance_: no layer can become smaller. The model is unchanged."
    nearest = max(others, key=lambda trial: trial.fraction)
    return (
        f"compress_to_tolerance_: no smaller size is within the tolerance: the score goes from {start.score:.6g} to "
        f"{nearest.score:.6g} at {nearest.fraction:.1%}. The model is unchanged. Allow more, or compress to a budget "
        "and recover."
    )
