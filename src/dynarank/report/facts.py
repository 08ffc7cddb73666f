"""The few numbers that the top of the page states, read from a history that may lack any of them."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from statistics import median
from typing import Any, TypeGuard

from dynarank.history import History
from dynarank.report.formats import by_name, count, duration, percent, short, title
from dynarank.report.points import finite

_MAX_LISTED_RANKS = 6
# In the order of preference; what was measured once at the end comes before what was measured on the way.
_QUALITY_IN_SERIES = ("validation_accuracy", "accuracy", "validation_loss", "loss")


@dataclass(frozen=True)
class Fact:
    """One headline number.

    Args:
        label: What it is.
        value: The number with its unit.
        note: Where it comes from or what it is compared with; may be empty.
    """

    label: str
    value: str
    note: str = ""


def headline(history: History) -> list[Fact]:
    """Return the headline numbers that the history can tell, at most five."""
    facts = (_quality(history), _parameters(history), _removed(history), _ranks(history), _time(history))
    return [fact for fact in facts if fact is not None]


def last_step(history: History) -> int:
    """Return the last step that any record names."""
    return max((step for record in history.records if isinstance(step := record.get("step"), int)), default=0)


def dense_parameters(history: History) -> float | None:
    """Return the number of parameters of the dense network, or None."""
    return first_number({**(history.summary or {}), **history.run}, "dense_parameters")


def deployed_parameters(history: History) -> float | None:
    """Return the number of parameters of the network as deployed at the end of the record, or None."""
    known = first_number(history.summary or {}, "deployed_parameters", "parameters")
    if known is not None:
        return known
    logged = finite(history.series("deployed_parameters"))
    return logged[-1][1] if logged else None


def matrix_shapes(history: History) -> dict[str, tuple[int, int]]:
    """Return ``(m, n)`` of each layer's dense weight as a matrix, for layers whose shape was recorded."""
    shapes = as_mapping(history.run.get("shapes"))
    return {layer: (shape[0], math.prod(shape[1:])) for layer, shape in shapes.items() if _is_shape(shape)}


def as_mapping(value: Any) -> Mapping[str, Any]:
    """Return the value if it is a mapping, otherwise an empty one: facts are whatever the run recorded."""
    return value if isinstance(value, Mapping) else {}


def first_number(facts: Mapping[str, Any], *names: str) -> float | None:
    """Return the first of the named facts that is a finite number, or None."""
    numbers = (facts.get(name) for name in names)
    return next((value for value in numbers if _is_number(value) and math.isfinite(value)), None)


def _quality(history: History) -> Fact | None:
    summary = history.summary or {}
    measured = [name for name in summary if _is_quality(name) and _is_number(summary[name])]
    if measured:
        best = "test_accuracy" if "test_accuracy" in measured else measured[0]
        deviation = first_number(summary, f"{best}_std")
        note = "" if deviation is None else f"± {by_name(best, deviation)}"
        return Fact(title(best), by_name(best, summary[best]), note)
    for name in _QUALITY_IN_SERIES:
        if points := history.series(name):
            return Fact(title(name), by_name(name, points[-1][1]), f"last value, step {count(points[-1][0])}")
    return None


def _parameters(history: History) -> Fact | None:
    deployed, dense = deployed_parameters(history), dense_parameters(history)
    if deployed is None:
        return None
    return Fact("Parameters", short(deployed), f"dense: {short(dense)}" if dense else "")


def _removed(history: History) -> Fact | None:
    deployed, dense = deployed_parameters(history), dense_parameters(history)
    if deployed is None or not dense:
        return None
    if deployed > dense:
        return Fact("Added", percent(deployed / dense - 1), "more parameters than the dense network")
    times = f"{dense / deployed:.1f} times smaller" if deployed else ""
    return Fact("Removed", percent(1 - deployed / dense), times)


def _ranks(history: History) -> Fact | None:
    ranks = [points[-1][1] for points in history.ranks().values()]
    if not ranks:
        return None
    if len(ranks) <= _MAX_LISTED_RANKS:
        return Fact("Ranks", " · ".join(str(rank) for rank in ranks), "in the order of the layers")
    return Fact("Ranks", f"{min(ranks)}–{max(ranks)}", f"{len(ranks)} layers, median {median(ranks):g}")


def _time(history: History) -> Fact | None:
    seconds = first_number(history.summary or {}, "seconds", "train_seconds")
    if seconds is None and (logged := finite(history.series("seconds"))):
        seconds = logged[-1][1]
    if seconds is None:
        return None
    return Fact("Training time", duration(seconds), f"to step {count(last_step(history))}")


def _is_quality(name: str) -> bool:
    return name.startswith("test_") and not name.endswith(("_std", "_seconds", "_bytes", "_samples", "_size"))


def _is_number(value: Any) -> TypeGuard[float]:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _is_shape(value: Any) -> bool:
    return isinstance(value, list) and len(value) >= 2 and all(isinstance(size, int) and size > 0 for size in value)
