"""Drawings of a benchmark: the time of a training step beside dense, by rank."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from dynarank.report.comparison_drawing import mark
from dynarank.report.formats import percent, power
from dynarank.report.svg import Palette

if TYPE_CHECKING:
    from matplotlib.axes import Axes


@dataclass(frozen=True)
class Dot:
    """A method at a rank.

    Args:
        rank: The rank, as a part of the full one.
        ratio: Median time of a step beside that of dense.
        low: Lower end of an interval of it.
        high: Upper end.
    """

    rank: float
    ratio: float
    low: float
    high: float


@dataclass(frozen=True)
class Panel:
    """A dense network with its rivals.

    Args:
        title: What it is.
        methods: What was measured, by method, in the order of colours and shapes.
        arithmetic: ``(rank, FLOPs beside dense)``: what a step would take if FLOPs were all.
        margin: Factor within which two equal dense networks were found to differ.
    """

    title: str
    methods: Mapping[str, Sequence[Dot]]
    arithmetic: Sequence[tuple[float, float]] = field(default_factory=tuple)
    margin: float = 1.0


def draw_panel(axes: "Axes", panel: Panel, *, palette: Palette) -> None:
    """Draw times by rank, dense as a line with the band that noise alone makes, and FLOPs as a dashed line."""
    axes.axhline(1, color=palette.muted, linewidth=1.2)
    axes.axhspan(1 / panel.margin, panel.margin, color=palette.muted, alpha=0.15, linewidth=0)
    if panel.arithmetic:
        ranks, flops = zip(*sorted(panel.arithmetic), strict=True)
        axes.plot(ranks, flops, color=palette.muted, linestyle=(0, (4, 3)), linewidth=1.2, marker="_", markersize=9)
    for index, dots in enumerate(panel.methods.values()):
        found = sorted(dots, key=lambda dot: dot.rank)
        ratios = [dot.ratio for dot in found]
        axes.errorbar(
            [dot.rank for dot in found],
            ratios,
            yerr=([dot.ratio - dot.low for dot in found], [dot.high - dot.ratio for dot in found]),
            color=palette.series[index % len(palette.series)],
            marker=mark(index),
            markersize=5,
            linewidth=1.2,
            elinewidth=1,
            capsize=2,
        )
    _scale(axes, sorted({dot.rank for dots in panel.methods.values() for dot in dots}))


def _scale(axes: "Axes", ranks: Sequence[float]) -> None:
    """Make both axes logarithmic: labels at the ranks that there are, and at round ratios."""
    from matplotlib.ticker import FixedLocator, FuncFormatter, LogLocator, NullLocator

    axes.set_xscale("log")
    axes.set_yscale("log")
    axes.xaxis.set_major_locator(FixedLocator(ranks))
    axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5), numticks=9))
    for axis, text in ((axes.xaxis, _part), (axes.yaxis, power)):
        axis.set_minor_locator(NullLocator())
        axis.set_major_formatter(FuncFormatter(lambda value, _, text=text: text(value)))
    axes.margins(x=0.15)
    axes.set_xlabel("rank, as a part of the full rank")


def _part(value: float) -> str:
    """Return a part in percent, with a digit where it is small.

    Example:
        >>> _part(0.125), _part(0.008), _part(0.25)
        ('12.5 %', '0.8 %', '25 %')
    """
    return percent(value).replace(".0 %", " %")
