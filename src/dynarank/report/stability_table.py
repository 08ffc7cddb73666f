"""The last look at the weights as a table: every measure of every layer, and how it moved over the run."""

from collections.abc import Callable
from dataclasses import dataclass
from math import isfinite
from typing import Any

from dynarank.analysis.tables import NOTHING, Table
from dynarank.history import History
from dynarank.report.facts import first_number
from dynarank.report.formats import percent, power
from dynarank.report.stability_plots import measured

LEGEND = (
    "S: mean cosine between the directions of the weight at this look and at the one before; 1 where none turned.",
    "overlap: of the subspaces of leading directions at both looks; 100 % where they are the same.",
    "change: ||W - W_before||_F / ||W_before||_F. S goes to 1 wherever this, or the learning rate, goes to 0.",
    "stable, effective: how many directions the weight uses, by its norms and by the entropy of its singular values.",
    "within: part of ||W||_F^2 within the rank, or within the largest rank at which two factors are smaller (pays to).",
    "above noise: singular values that a matrix of random entries, of the level found in the weight, would not have.",
)


@dataclass(frozen=True)
class _Measure:
    """A column: its head, the name in a look, how a value is told and how a difference."""

    head: str
    name: str
    text: Callable[[float], str]
    moved: Callable[[float], str]


def _signed(form: str, factor: float = 1.0) -> Callable[[float], str]:
    return lambda value: format(factor * value, f"+{form}")


_MEASURES = (
    _Measure("S", "stability", "{:.4f}".format, _signed(".4f")),
    _Measure("overlap", "overlap", percent, _signed(".1f", 100)),
    _Measure("change", "change", lambda value: power(float(f"{value:.2g}")), _signed(".2g")),
    _Measure("stable", "stable_rank", "{:.1f}".format, _signed(".1f")),
    _Measure("effective", "effective_rank", "{:.1f}".format, _signed(".1f")),
    _Measure("within", "retained_energy", percent, _signed(".1f", 100)),
    _Measure("above noise", "above_bulk", "{:.0f}".format, _signed(".0f")),
    _Measure("rank", "rank", "{:.0f}".format, _signed(".0f")),
)


def look_table(history: History) -> Table:
    """Return the measures at the last look, two rows a layer: what they are, and how they moved over the run.

    A measure has moved since the first look that has it.

    Raises:
        ValueError: The history holds no look.
    """
    looks = history.looks
    if not looks:
        raise ValueError("the history holds no look at the weights: record some by dynarank.stability.WeightWatch.")
    series = {measure.name: measured(history, measure.name) for measure in _MEASURES}
    rows = []
    for name, found in looks[-1]["layers"].items():
        values = [(measure, first_number(found, measure.name)) for measure in _MEASURES]
        firsts = {measure: points[name][0][1] for measure, points in series.items() if name in points}
        rows.append((name, _shape(found), *(NOTHING if v is None else m.text(v) for m, v in values), _pays(found)))
        rows.append(("", "", *(_moved(m, v, firsts.get(m.name)) for m, v in values), ""))
    head = ("layer", "shape", *(measure.head for measure in _MEASURES), "pays to")
    return Table(head, tuple(rows), tuple(range(1, len(head))))


def look_title(history: History) -> str:
    """Return which look the table is of, and since when its measures moved.

    Example:
        >>> history = History()
        >>> for step in (0, 25, 50):
        ...     history.look(step=step, layers={}, lr=0.1)
        >>> look_title(history)
        'Look 3, at step 50 (learning rate 0.1), compared with step 25; below each value how it moved over the run.'
    """
    looks = history.looks
    rate = first_number(looks[-1], "lr")
    parts = [f"Look {len(looks)}, at step {looks[-1]['step']}"]
    parts += [f" (learning rate {power(float(f'{rate:.3g}'))})"] if rate is not None else []
    parts += [f", compared with step {looks[-2]['step']}"] if len(looks) > 1 else []
    return "".join(parts) + "; below each value how it moved over the run."


def _moved(measure: _Measure, value: float | None, first: float | None) -> str:
    if value is None or first is None:
        return ""
    text = measure.moved(value - first)
    return "" if not float(text) or not isfinite(value - first) else text


def _shape(found: dict[str, Any]) -> str:
    shape = found.get("shape")
    return " x ".join(map(str, shape)) if isinstance(shape, list) else NOTHING


def _pays(found: dict[str, Any]) -> str:
    value = first_number(found, "break_even")
    return NOTHING if value is None else f"{value:.0f}"
