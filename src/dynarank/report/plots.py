"""The plots of the page: which numbers of a history go into which drawing, with title and legend."""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial

from dynarank.history import History
from dynarank.report.curve_drawing import common_steps, draw_curves, draw_size, draw_stack
from dynarank.report.facts import dense_parameters, last_step
from dynarank.report.formats import title
from dynarank.report.markup import Markup
from dynarank.report.points import Points, finite, spaced
from dynarank.report.rank_drawing import RankCurve, draw_ranks, draw_spectrum
from dynarank.report.svg import PAGE, inline

MAX_TOGETHER = len(PAGE.series)  # more layers than colours get a small drawing each
_SMALL = {"width": 210.0, "height": 142.0}
_PARAMETERS = ("deployed_parameters", "trainable_parameters")
_MEMORY = ("weight_bytes", "gradient_bytes", "optimizer_bytes")
_MAX_OTHERS = 12
_MAX_EVENT_MARKS = 300


@dataclass(frozen=True)
class Plot:
    """One drawing.

    Args:
        title: What it shows.
        svg: The drawing.
        legend: Names of the curves in the order of the colours; empty where the title says it.
    """

    title: str
    svg: Markup
    legend: tuple[str, ...] = ()


def rank_curves(history: History) -> dict[str, RankCurve]:
    """Return ``(step, rank, candidates)`` of each layer from step 0 on."""
    candidates: dict[str, list[int]] = {}
    for event in history.events:
        candidates.setdefault(event.layer, [0]).append(event.candidates)
    return {
        layer: [(step, rank, extra) for (step, rank), extra in zip(points, candidates.get(layer, [0]), strict=True)]
        for layer, points in history.ranks().items()
    }


def rank_plots(history: History) -> list[Plot]:
    """Return the ranks over time: one drawing of a few layers together, or one for each of many."""
    curves = rank_curves(history)
    end = last_step(history)
    if not curves:
        return []
    if len(curves) <= MAX_TOGETHER:
        paint = partial(draw_ranks, curves=curves, last_step=end, palette=PAGE)
        svg = inline(paint, key="ranks", label="Rank of each layer over time", height=270)
        return [Plot("Rank of each layer", svg, tuple(curves))]
    plots = []
    for index, (layer, curve) in enumerate(curves.items()):
        paint = partial(draw_ranks, curves={layer: curve}, last_step=end, palette=PAGE, scale_of=curves)
        plots.append(Plot(layer, inline(paint, key=f"rank{index}", label=f"Rank of {layer} over time", **_SMALL)))
    return plots


def spectrum_plots(history: History) -> list[Plot]:
    """Return the singular values over time, one drawing for each layer."""
    end = last_step(history)
    plots = []
    for index, (layer, spectra) in enumerate(history.spectra().items()):
        if any(row for _, row in spectra):
            paint = partial(draw_spectrum, spectra=spectra, last_step=end, palette=PAGE)
            svg = inline(paint, key=f"sigma{index}", label=f"Singular values of {layer} over time", **_SMALL)
            plots.append(Plot(layer, svg))
    return plots


def quality_plots(history: History) -> list[Plot]:
    """Return the losses and the accuracies over time, with the rank events marked."""
    keys = _logged(history)
    losses = [key for key in keys if key == "loss" or key.endswith("_loss")]
    accuracies = [key for key in keys if key == "accuracy" or key.endswith("_accuracy")]
    plots = [_curves(history, losses, name="Loss"), _curves(history, accuracies, name="Accuracy")]
    return [plot for plot in plots if plot is not None]


def size_plots(history: History) -> list[Plot]:
    """Return the parameters against the dense network and the memory over time."""
    end = last_step(history)
    plots = []
    curves = {key: points for key, points in _series(history, _PARAMETERS).items() if finite(points)}
    if curves:
        paint = partial(draw_size, curves=curves, dense=dense_parameters(history), last_step=end, palette=PAGE)
        svg = inline(paint, key="size", label="Parameters over time, against the dense network")
        plots.append(Plot("Parameters", svg, _titles(curves)))
    memory = _series(history, _MEMORY)
    if common_steps(memory):
        paint = partial(draw_stack, parts=memory, last_step=end, palette=PAGE)
        svg = inline(paint, key="memory", label="Memory over time")
        plots.append(Plot("Memory while training, without activations", svg, _titles(memory)))
    return plots


def other_plots(history: History) -> list[Plot]:
    """Return the other logged numbers over time, a small drawing for each of the first dozen."""
    shown = (*_PARAMETERS, *_MEMORY, "seconds")
    keys = [key for key in _logged(history) if key not in shown and not key.endswith(("loss", "accuracy"))]
    end = last_step(history)
    plots = []
    for index, key in enumerate(keys[:_MAX_OTHERS]):
        paint = partial(draw_curves, curves=_series(history, [key]), event_steps=(), last_step=end, palette=PAGE)
        plots.append(Plot(title(key), inline(paint, key=f"other{index}", label=f"{title(key)} over time", **_SMALL)))
    return plots


def event_steps(history: History) -> list[int]:
    """Return the steps at which the rank of a layer changed, in order."""
    return sorted({event.step for event in history.events if event.old_rank != event.new_rank or event.candidates})


def _curves(history: History, keys: list[str], *, name: str) -> Plot | None:
    curves = _series(history, keys)
    if not curves:
        return None
    fractions = all(abs(value) <= 1 for points in curves.values() for _, value in points if value == value)
    unit = "%" if name == "Accuracy" and fractions else ""
    events = spaced(event_steps(history), limit=_MAX_EVENT_MARKS)
    end = last_step(history)
    paint = partial(draw_curves, curves=curves, event_steps=events, last_step=end, palette=PAGE, unit=unit)
    return Plot(name, inline(paint, key=name.lower(), label=f"{name} over time"), _titles(curves))


def _logged(history: History) -> list[str]:
    """Return the names of all logged numbers in the order in which they first came."""
    return list(dict.fromkeys(key for record in history.metrics for key in record if key != "step"))


def _series(history: History, keys: list[str] | tuple[str, ...]) -> dict[str, Points]:
    series = {key: history.series(key) for key in keys}
    return {key: points for key, points in series.items() if points}


def _titles(curves: Mapping[str, Points]) -> tuple[str, ...]:
    return tuple(f"Training {key}" if key in ("loss", "accuracy") else title(key) for key in curves)
