"""Drawings of contestants: how good they are against what they cost."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from dynarank.report.formats import percent, power
from dynarank.report.svg import Palette
from dynarank.report.ticks import numbers

if TYPE_CHECKING:
    from matplotlib.axes import Axes

GLYPHS = {"o": "●", "s": "■", "^": "▲", "D": "◆", "v": "▼", "P": "✚", "X": "✖"}  # as drawn and as written
_MARKS = tuple(GLYPHS)
_WIDE = 4  # ratio of the largest to the smallest cost from which on the axis is logarithmic


@dataclass(frozen=True)
class Place:
    """Where a contestant stands.

    Args:
        series: Index of its method, which gives colour and shape.
        cost: How much it costs.
        quality: How good it is.
        deviation: Standard deviation of that, 0 where it is not known.
    """

    series: int
    cost: float
    quality: float
    deviation: float = 0.0


def mark(series: int) -> str:
    """Return the shape of a method; with seven shapes and six colours no two of 42 methods look alike."""
    return _MARKS[series % len(_MARKS)]


def draw_pareto(
    axes: "Axes",
    places: Sequence[Place],
    *,
    dense: Place | None,
    higher_is_better: bool,
    label: str,
    palette: Palette,
    unit: str = "",
) -> None:
    """Draw quality against cost with error bars, the dense network as a line, and the front that nobody beats.

    Args:
        axes: Axes to draw on.
        places: The contestants, the dense network left out.
        dense: The dense network, whose quality is the dashed line, with a band of its deviation.
        higher_is_better: Whether quality should be high.
        label: What the cost is.
        palette: Colours.
        unit: ``"%"`` where quality is a fraction.
    """
    if dense is not None:
        axes.axhline(dense.quality, color=palette.muted, linestyle=(0, (4, 3)), linewidth=1.2)
        low, high = dense.quality - dense.deviation, dense.quality + dense.deviation
        axes.axhspan(low, high, color=palette.muted, alpha=0.15, linewidth=0)
        at: dict[str, Any] = {"xycoords": ("axes fraction", "data"), "textcoords": "offset points"}
        axes.annotate("dense", (1, dense.quality), xytext=(0, 3), va="bottom", ha="right", fontsize=10, **at)
    best = front(places, higher_is_better=higher_is_better)
    axes.plot([p.cost for p in best], [p.quality for p in best], color=palette.muted, linewidth=5, alpha=0.3, zorder=1)
    for series in dict.fromkeys(place.series for place in places):
        _draw_method(axes, [place for place in places if place.series == series], palette)
    _scale(axes, [place.cost for place in places])
    axes.set_xlabel(label)
    axes.margins(y=0.12)
    if not places and dense is None:
        axes.text(0.5, 0.5, "no run has ended yet", ha="center", transform=axes.transAxes)
    numbers(axes, unit=unit)


def front(places: Sequence[Place], *, higher_is_better: bool) -> list[Place]:
    """Return the places at which nothing that costs as little is as good, by rising cost.

    Example:
        >>> places = [Place(0, 1.0, 0.5), Place(0, 2.0, 0.4), Place(0, 3.0, 0.9)]
        >>> [place.cost for place in front(places, higher_is_better=True)]
        [1.0, 3.0]
    """
    sign = 1 if higher_is_better else -1
    found: list[Place] = []
    for place in sorted(places, key=lambda place: (place.cost, -sign * place.quality)):
        if not found or sign * place.quality > sign * found[-1].quality:
            found.append(place)
    return found


def _draw_method(axes: "Axes", places: Sequence[Place], palette: Palette) -> None:
    """Draw the sizes of one method, joined by a faint line."""
    series = places[0].series
    color = palette.series[series % len(palette.series)]
    costs, qualities = [place.cost for place in places], [place.quality for place in places]
    axes.plot(costs, qualities, color=color, linewidth=1, alpha=0.45)
    axes.errorbar(
        costs,
        qualities,
        yerr=[place.deviation for place in places],
        color=color,
        marker=mark(series),
        markersize=6,
        elinewidth=1.2,
        capsize=2.5,
        linestyle="none",
    )


def _scale(axes: "Axes", costs: Sequence[float]) -> None:
    """Label the horizontal axis with percentages, on a logarithmic scale where the costs span a wide range."""
    from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullLocator

    positive = [cost for cost in costs if cost > 0]
    axes.grid(True, axis="x")
    if positive and max(positive) > _WIDE * min(positive):
        axes.set_xscale("log")
        axes.set_xlim(min(positive) / 1.4, max(positive) * 1.4)
        axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5), numticks=8))
        axes.xaxis.set_minor_locator(NullLocator())
    elif positive:
        axes.set_xlim(0, 1.1 * max(positive))
        axes.xaxis.set_major_locator(MaxNLocator(nbins=6))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: _share(value)))


def _share(value: float) -> str:
    return percent(value, digits=0) if value >= 0.0995 or value == 0 else f"{power(100 * value)} %"
