"""Drawings of looks at the weights: a map of layers by steps, lines of measures, singular values against noise."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from dynarank.analysis.spectra import noise_curve
from dynarank.report.points import Points, columns, finite
from dynarank.report.svg import Palette
from dynarank.report.ticks import label_steps, numbers, powers_of_ten, whole_numbers

if TYPE_CHECKING:
    from matplotlib.axes import Axes

Cells = Sequence[tuple[int, int, float]]  # from the look at one step, to the look at another, S between them

SIGMA, NOISE = range(2)  # colours of singular values and of the edge of the noise
SCALE = (0.0, 0.9, 0.99, 0.999, 0.9999)  # of S, evenly spaced
_STILLEST = 1e-6  # float32 does not resolve 1 - S below
_FAINTEST = 0.06  # opacity of S = 0, so that it differs from nothing
_MAX_NAME = 28
_DASHED = (0, (4, 3))


@dataclass(frozen=True)
class Spectrum:
    """Singular values of one layer at one look.

    Args:
        shape: ``(m, n)`` of the weight.
        positions: Positions of the singular values, from 1 on.
        sigma: The singular values.
        level: Standard deviation of the entries of noise; 0 where none shows.
        threshold: What its largest singular value rarely exceeds.
    """

    shape: tuple[int, int]
    positions: Sequence[int]
    sigma: Sequence[float]
    level: float
    threshold: float


def draw_map(axes: "Axes", cells: Mapping[str, Cells], *, palette: Palette) -> None:
    """Draw S as a map, a row for each layer: the fuller the colour, the less its directions turned.

    The scale is that of ``log(1 - S)`` and the same on every map.

    Args:
        axes: Axes to draw on; the steps are labelled by `label_steps`.
        cells: What S was between looks, by layer, the first layer at the top.
        palette: Colours.
    """
    color = palette.series[0]
    for row, own in enumerate(cells.values()):
        shades = [(color, shade(value)) for _, _, value in own]
        starts, ends = [start for start, _, _ in own], [end for _, end, _ in own]
        widths = [end - start for start, end in zip(starts, ends, strict=True)]
        axes.barh([row] * len(own), widths, left=starts, height=0.9, color=shades, linewidth=0)
    axes.set_yticks(range(len(cells)), [_shortened(name) for name in cells])
    axes.set_ylim(len(cells) - 0.4, -0.6)
    axes.grid(False)
    axes.tick_params(axis="x", labelbottom=False)


def draw_key(axes: "Axes", *, palette: Palette) -> None:
    """Draw what the colours of a map mean, above it."""
    from matplotlib.patches import Patch

    color = palette.series[0]
    keys = [Patch(color=(color, shade(value)), linewidth=0, label=f"{value:g}") for value in SCALE]
    keys[0].set_label(f"S = {SCALE[0]:g}")
    style = {"frameon": False, "borderaxespad": 0.0, "handlelength": 1.0, "columnspacing": 1.0, "fontsize": 10}
    axes.legend(handles=keys, ncols=len(keys), loc="lower right", bbox_to_anchor=(1, 1.01), **style)


def shade(value: float) -> float:
    """Return the opacity of a cell.

    Example:
        >>> [round(shade(value), 2) for value in (-0.2, 0.0, 0.9, 0.9999, 1.0)]
        [0.06, 0.06, 0.29, 1.0, 1.0]
    """
    stillness = -math.log10(max(1 - value, 1e-4)) / math.log10(1e4)
    return _FAINTEST + (1 - _FAINTEST) * max(0.0, stillness)


def draw_unrest(axes: "Axes", curves: Mapping[str, Points], *, palette: Palette) -> None:
    """Draw ``1 - S`` over time on a logarithmic axis.

    Args:
        axes: Axes to draw on; the steps are labelled by `label_steps`.
        curves: S by name, in the order of the colours; of one name there is one colour.
        palette: Colours.
    """
    values = []
    for (_, points), color in zip(curves.items(), palette.series, strict=False):
        points = [(step, max(1 - value, _STILLEST)) for step, value in finite(points)]
        values += columns(points)[1]
        axes.plot(*columns(points), color=color, marker="o" if len(points) < 25 else None, markersize=3)
    if values:
        powers_of_ten(axes)
    axes.set_ylabel("1 − S, mean")


def draw_rate(axes: "Axes", rates: Points, *, palette: Palette) -> None:
    """Draw the learning rate over time, from zero."""
    axes.plot(*columns(rates), color=palette.muted, linewidth=1.5)
    axes.set_ylim(0, 1.15 * max(columns(rates)[1]) or 1)
    numbers(axes)
    axes.set_ylabel("lr")


def draw_stability(
    axes: "Axes", cells: Mapping[str, Cells], mean: Points, rates: Points, *, last_step: int, palette: Palette
) -> None:
    """Draw the map of S, under it the mean of ``1 - S`` and, where it is known, the learning rate.

    Args:
        axes: Axes whose place the two or three drawings take in their figure.
        cells: What S was between looks, by layer.
        mean: Mean of S over the layers.
        rates: Learning rates; may be empty.
        last_step: Where the steps end.
        palette: Colours.
    """
    figure = axes.figure
    axes.remove()
    heights = [map_height(len(cells)), 90, 60][: 3 if rates else 2]
    # Squeezed, a column of axes comes as an array of numpy, which is no dependency: a list of them serves.
    parts = list(figure.subplots(len(heights), 1, sharex=True, gridspec_kw={"height_ratios": heights}))
    draw_map(parts[0], cells, palette=palette)
    draw_key(parts[0], palette=palette)
    draw_unrest(parts[1], {"mean": mean}, palette=palette)
    if rates:
        draw_rate(parts[2], rates, palette=palette)
    label_steps(parts[-1], last_step=last_step)


def map_height(layers: int) -> float:
    """Return the height of a map in the units of text that is 11 high."""
    return 34 + 17 * layers


def draw_measure(
    axes: "Axes", curves: Mapping[str, Points], *, last_step: int, palette: Palette, unit: str = ""
) -> None:
    """Draw one measure over time, a line for each layer; of more layers than colours faint ones with their mean.

    Args:
        axes: Axes to draw on.
        curves: Points by layer, in the order of the colours.
        last_step: Where the axis ends.
        palette: Colours.
        unit: ``"%"`` for fractions; otherwise the axis is logarithmic where values span a wide range.
    """
    many = len(curves) > len(palette.series)
    values = []
    for index, points in enumerate(curves.values()):
        points = finite(points)
        values += columns(points)[1]
        style = {"color": palette.series[0 if many else index], "alpha": 0.25 if many else 1.0}
        axes.plot(*columns(points), linewidth=1.0 if many else 1.5, **style)
    if many:
        axes.plot(*columns(mean_of(curves)), color=palette.ink, linewidth=1.8)
    if not values:
        axes.text(0.5, 0.5, "no finite value", ha="center", transform=axes.transAxes)
    elif not unit and min(values) > 0 and max(values) > 30 * min(values):
        powers_of_ten(axes)
    else:
        numbers(axes, unit=unit)
    label_steps(axes, last_step=last_step)


def mean_of(curves: Mapping[str, Points]) -> Points:
    """Return the mean over all curves that have a finite value at a step.

    Example:
        >>> mean_of({"a": [(1, 2.0), (2, 3.0)], "b": [(2, 5.0)]})
        [(1, 2.0), (2, 4.0)]
    """
    found: dict[int, list[float]] = {}
    for points in curves.values():
        for step, value in finite(points):
            found.setdefault(step, []).append(value)
    return [(step, math.fsum(values) / len(values)) for step, values in sorted(found.items())]


def draw_bulk(axes: "Axes", first: Spectrum, last: Spectrum, *, palette: Palette) -> None:
    """Draw singular values by rank, those at the first look faint, and those of noise of the same level.

    Args:
        axes: Axes to draw on.
        first: What they were at the first look.
        last: What they are at the last one, with the noise that is drawn.
        palette: Colours.
    """
    values: list[float] = []
    for spectrum, alpha in ((first, 0.35), (last, 1.0)):
        shown = [(r, s) for r, s in zip(spectrum.positions, spectrum.sigma, strict=True) if 0 < s < math.inf]
        values += _columns(shown)[1]
        marker = "o" if len(shown) < 20 else None
        axes.plot(*_columns(shown), color=palette.series[SIGMA], alpha=alpha, marker=marker, markersize=2.5)
    if last.level:
        ranks = [1 + index * (min(last.shape) - 1) / 64 for index in range(65)]
        noise = noise_curve(last.shape, last.level, ranks).tolist()
        axes.plot(ranks, noise, color=palette.muted, linestyle=_DASHED, linewidth=1.3)
        axes.axhline(last.threshold, color=palette.series[NOISE], linestyle=_DASHED, linewidth=1.1)
    if values:
        if max(values) < 6 * min(values):  # too little for two marks of a logarithmic scale
            axes.set_ylim(min(values) / 2, 2 * max(values))
        powers_of_ten(axes)
    whole_numbers(axes.xaxis)
    axes.set_xlabel("rank")


def _columns(points: Sequence[tuple[int, float]]) -> tuple[list[int], list[float]]:
    return [x for x, _ in points], [y for _, y in points]


def _shortened(name: str) -> str:
    return name if len(name) <= _MAX_NAME else f"…{name[1 - _MAX_NAME :]}"
