"""Drawings of logged numbers over time: curves, parameters against the dense network, memory."""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from dynarank.report.points import MAX_POINTS, Points, columns, finite, smooth, spaced, thin
from dynarank.report.svg import Palette
from dynarank.report.ticks import label_steps, numbers, powers_of_ten

if TYPE_CHECKING:
    from matplotlib.axes import Axes

MAX_EVENT_LINES = 60
_NOISY = 80  # a curve of more points than this is drawn faint, with its means on top
_FEW = 25  # a curve of fewer points shows each of them


def draw_curves(
    axes: "Axes",
    curves: Mapping[str, Points],
    *,
    event_steps: Sequence[int],
    last_step: int,
    palette: Palette,
    unit: str = "",
) -> None:
    """Draw numbers over time; noisy ones faint with their means on top; rank events as thin lines.

    Args:
        axes: Axes to draw on.
        curves: Points by name, in the order of the colours; values that are not finite are left out.
        event_steps: Steps of the rank events; more than MAX_EVENT_LINES are short ticks at the bottom.
        last_step: Where the axis ends.
        palette: Colours.
        unit: ``"%"`` for fractions that are shown as percentages; otherwise plain numbers, on a logarithmic axis
            where they span a wide range.
    """
    values = []
    for index, points in enumerate(curves.values()):
        points = finite(points)
        values += columns(points)[1]
        _draw_curve(axes, points, color=palette.series[index % len(palette.series)])
    top = 1.0 if len(event_steps) <= MAX_EVENT_LINES else 0.04
    axes.vlines(event_steps, 0, top, transform=axes.get_xaxis_transform(), color=palette.rule, linewidth=0.7, zorder=0)
    if not values:
        axes.text(0.5, 0.5, "no finite value was logged", ha="center", transform=axes.transAxes)
    elif not unit and min(values) > 0 and max(values) > 30 * min(values):
        powers_of_ten(axes)
    else:
        numbers(axes, unit=unit)
    label_steps(axes, last_step=last_step)


def draw_size(
    axes: "Axes", curves: Mapping[str, Points], *, dense: float | None, last_step: int, palette: Palette
) -> None:
    """Draw numbers of parameters over time from zero, with the dense network as a dashed line."""
    largest = dense or 0.0
    # The second curve often repeats the first: dashed, so that both are seen.
    for points, color, dashes in zip(curves.values(), palette.series, ("-", (0, (3, 3))), strict=False):
        steps, values = columns(thin(finite(points)))
        largest = max(largest, *values)
        marker = "o" if len(points) == 1 else None
        axes.plot(steps, values, drawstyle="steps-post", color=color, linestyle=dashes, marker=marker, markersize=4)
    if dense:
        axes.axhline(dense, color=palette.muted, linestyle=(0, (4, 3)), linewidth=1.2)
        at = {"xycoords": ("axes fraction", "data"), "xytext": (0, 3), "textcoords": "offset points"}
        axes.annotate("dense", (1, dense), va="bottom", ha="right", fontsize=10, **at)
    axes.set_ylim(0, 1.14 * largest or 1)
    numbers(axes)
    label_steps(axes, last_step=last_step)


def draw_stack(axes: "Axes", parts: Mapping[str, Points], *, last_step: int, palette: Palette) -> None:
    """Draw bytes over time, stacked on each other, at the steps at which every part was logged."""
    tables = [dict(finite(points)) for points in parts.values()]
    steps = spaced(common_steps(parts), limit=MAX_POINTS)
    rows = [[values[step] for step in steps] for values in tables]
    if len(steps) == 1:  # an area needs a width
        steps, rows = [0, max(steps[0], 1)], [[*row, *row] for row in rows]
    below = [0.0] * len(steps)
    for row, color in zip(rows, palette.series, strict=False):
        above = [low + value for low, value in zip(below, row, strict=True)]
        axes.fill_between(steps, below, above, step="post", color=color, alpha=0.7, linewidth=0)
        below = above
    axes.set_ylim(bottom=0)
    numbers(axes, unit="B")
    label_steps(axes, last_step=last_step)


def common_steps(parts: Mapping[str, Points]) -> list[int]:
    """Return the steps at which every part has a finite value, in order."""
    steps = [{step for step, _ in finite(points)} for points in parts.values()]
    return sorted(set.intersection(*steps)) if steps else []


def _draw_curve(axes: "Axes", points: Points, *, color: str) -> None:
    line = points
    if len(points) > _NOISY:
        axes.plot(*columns(thin(points)), color=color, alpha=0.28, linewidth=0.9)
        line = smooth(points)
    marker = "o" if len(points) <= _FEW else None
    axes.plot(*columns(line), color=color, marker=marker, markersize=3.2)
