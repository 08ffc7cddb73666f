"""The plots of the looks at the weights in a history: what goes into which drawing, with title and legend."""

from functools import partial
from itertools import pairwise
from typing import Any

from dynarank.history import History
from dynarank.report.facts import first_number, last_step
from dynarank.report.plots import MAX_TOGETHER, Plot
from dynarank.report.points import Points, finite, spaced
from dynarank.report.stability_drawing import (
    Cells,
    Spectrum,
    draw_bulk,
    draw_measure,
    draw_stability,
    map_height,
    mean_of,
)
from dynarank.report.svg import PAGE, inline

MAX_LAYERS = 48  # rows of the map; of more layers evenly spaced ones
_MAX_LOOKS = 60
_SMALL = {"width": 210.0, "height": 142.0}
_WIDE = 900.0
# Measures by their name in a look: title and unit.
_MEASURES = {
    "overlap": ("Overlap of leading directions", "%"),
    "change": ("Change, ‖ΔW‖ / ‖W‖", ""),
    "stable_rank": ("Stable rank", ""),
    "effective_rank": ("Effective rank", ""),
    "retained_energy": ("Energy within a paying rank", "%"),
    "above_bulk": ("Singular values above noise", ""),
}


def stability_plot(history: History) -> Plot | None:
    """Return the map of S with its mean and the learning rate; None where no two looks can be compared."""
    cells, end = _cells(history), last_step(history)
    if not cells:
        return None
    shown = {name: cells[name] for name in spaced(list(cells), limit=MAX_LAYERS)}
    mean = mean_of({name: [(to, value) for _, to, value in own] for name, own in cells.items()})
    rates = finite([(look["step"], rate) for look in history.looks if (rate := first_number(look, "lr")) is not None])
    paint = partial(draw_stability, cells=shown, mean=mean, rates=rates, last_step=end, palette=PAGE)
    height = map_height(len(shown)) + 130 + (75 if rates else 0)
    label = "Stability S of each layer over time, its mean, and the learning rate"
    title = "S by layer and step, between a look and the one before"
    return Plot(title, inline(paint, key="looks", label=label, width=_WIDE, height=height))


def measure_plots(history: History) -> list[Plot]:
    """Return a small drawing of every other measure over time, a line for each layer."""
    end, layers, plots = last_step(history), _layers(history), []
    for measure, (title, unit) in _MEASURES.items():
        found = measured(history, measure)
        if found:
            curves = {name: found.get(name, []) for name in layers}  # all of them: their order gives the colours
            paint = partial(draw_measure, curves=curves, last_step=end, palette=PAGE, unit=unit)
            plots.append(Plot(title, inline(paint, key=measure, label=f"{title} over time", **_SMALL)))
    return plots


def bulk_plots(history: History) -> list[Plot]:
    """Return the singular values of each layer at the first and the last look, against those of noise."""
    spectra: dict[str, list[Spectrum]] = {}
    for look in history.looks:
        for name, found in look["layers"].items():
            if (spectrum := _spectrum(found)) is not None:
                spectra.setdefault(name, []).append(spectrum)
    plots = []
    for index, (name, own) in enumerate(spectra.items()):
        paint = partial(draw_bulk, first=own[0], last=own[-1], palette=PAGE)
        svg = inline(paint, key=f"bulk{index}", label=f"Singular values of {name} at the last look", **_SMALL)
        plots.append(Plot(name, svg))
    return plots


def legend(history: History) -> tuple[str, ...]:
    """Return the layers in the order of their colours; empty where there are more than colours."""
    layers = _layers(history)
    return tuple(layers) if len(layers) <= MAX_TOGETHER else ()


def measured(history: History, measure: str) -> dict[str, Points]:
    """Return a measure of each layer over time, steps without it left out."""
    curves: dict[str, list[tuple[int, float]]] = {}
    for look in history.looks:
        for name, found in look["layers"].items():
            if (value := first_number(found, measure)) is not None:
                curves.setdefault(name, []).append((look["step"], value))
    return dict(curves)


def _layers(history: History) -> list[str]:
    return list(dict.fromkeys(name for look in history.looks for name in look["layers"]))


def _cells(history: History) -> dict[str, Cells]:
    """Return what S was between two looks, by layer; of many looks evenly spaced ones."""
    cells: dict[str, list[tuple[int, int, float]]] = {}
    for before, look in pairwise(spaced(history.looks, limit=_MAX_LOOKS)):
        for name, found in look["layers"].items():
            if (value := first_number(found, "stability")) is not None:
                cells.setdefault(name, []).append((before["step"], look["step"], value))
    return dict(cells)


def _spectrum(found: dict[str, Any]) -> Spectrum | None:
    """Return the singular values that a look at a layer recorded, or None where it holds none that fit."""
    positions, sigma, shape = (_numbers(found, name) for name in ("positions", "singular_values", "shape"))
    level, threshold = (first_number(found, name) for name in ("bulk_level", "bulk_threshold"))
    if not sigma or len(positions) != len(sigma) or len(shape) != 2 or min(shape) < 1:
        return None
    return Spectrum((shape[0], shape[1]), positions, sigma, level or 0.0, threshold or 0.0)


def _numbers(found: dict[str, Any], name: str) -> list[Any]:
    value = found.get(name)
    return value if isinstance(value, list) and all(isinstance(item, int | float) for item in value) else []
