"""The tables of the page: networks compared, layers, rank events, and the facts that reproduce the run."""

import json
from typing import Any

from dynarank.history import History
from dynarank.report.facts import as_mapping, matrix_shapes
from dynarank.report.formats import by_name, count, percent, title
from dynarank.report.markup import Markup, details, element, join, keyed, table
from dynarank.report.plots import MAX_TOGETHER, rank_curves

_MAX_OPEN_LAYERS = 12
_MAX_OPEN_EVENTS = 8
_MAX_EVENTS = 1000


def comparison_table(history: History) -> Markup | None:
    """Return this network and others side by side, or None if the summary has no ``comparison``.

    A number whose name has a second one with ``_std`` behind is shown with it as its deviation.
    """
    rows = (history.summary or {}).get("comparison")
    rows = [row for row in rows if isinstance(row, dict)] if isinstance(rows, list) else []
    if not rows:
        return None
    keys = [key for key in dict.fromkeys(key for row in rows for key in row) if key != "name"]
    keys = [key for key in keys if not (key.endswith("_std") and key.removesuffix("_std") in keys)]
    cells = [[row.get("name", "–"), *(_with_deviation(key, row) for key in keys)] for row in rows]
    return table(["Network", *map(title, keys)], cells, numeric=range(1, len(keys) + 1))


def layer_table(history: History) -> Markup:
    """Return the first and last rank of each layer, against its dense weight where the shapes are known."""
    shapes = matrix_shapes(history)
    curves = rank_curves(history)
    rows = []
    for index, (layer, curve) in enumerate(curves.items()):
        first, last = curve[0][1], curve[-1][1]
        name = keyed(index, layer) if len(curves) <= MAX_TOGETHER else layer
        row = [name, f"{first} → {last}" if first != last else str(last)]
        rows.append([*row, *_against_dense(shapes.get(layer), last)] if shapes else row)
    head = ["Layer", "Rank", *(["Full rank", "Weights kept"] if shapes else [])]
    body = table(head, rows, numeric=range(1, len(head)))
    return details(f"Table of all {len(rows)} layers", body) if len(rows) > _MAX_OPEN_LAYERS else body


def event_table(history: History) -> Markup | None:
    """Return the rank events, newest first, folded if they are many; None if there was none."""
    rows = [
        [
            event.layer,
            count(event.step),
            f"{event.old_rank} → {event.new_rank}" if event.old_rank != event.new_rank else str(event.new_rank),
            f"+{event.candidates}" if event.candidates else "–",
            percent(event.tail, digits=2) if event.tail else "–",
            event.reason,
        ]
        for event in reversed(history.events)
    ]
    if not rows:
        return None
    head = ["Layer", "Step", "Rank", "Candidates", "Discarded", "Reason"]
    body = table(head, rows[:_MAX_EVENTS], numeric=(1, 2, 3, 4))
    if len(rows) <= _MAX_OPEN_EVENTS:
        return body
    left_out = len(rows) - _MAX_EVENTS
    note = element("p", f"{count(left_out)} older entries are in the history file.") if left_out > 0 else None
    return details(f"Show {count(min(len(rows), _MAX_EVENTS))} entries, newest first", body, note)


def facts(recorded: dict[str, Any], *, folded: bool) -> Markup:
    """Return recorded facts by name; nested ones as JSON, folded away if asked."""
    return join(_fact(key, value, folded=folded) for key, value in recorded.items())


def _against_dense(shape: tuple[int, int] | None, rank: int) -> list[str]:
    if shape is None:
        return ["–", "–"]
    m, n = shape
    return [count(min(m, n)), percent(rank * (m + n) / (m * n))]


def _with_deviation(key: str, row: dict[str, Any]) -> str:
    value, deviation = row.get(key), row.get(f"{key}_std")
    if value is None or deviation is None:
        return by_name(key, value)
    return f"{by_name(key, value)} ± {by_name(key, deviation)}"


def _fact(key: str, value: Any, *, folded: bool) -> Markup:
    if not as_mapping(value) and not isinstance(value, list):
        return element("p", element("b", f"{title(key)}: "), by_name(key, value))
    body = element("pre", element("code", json.dumps(value, indent=2, ensure_ascii=False)), tabindex="0")
    return details(title(key), body) if folded else join([element("h3", title(key)), body])
