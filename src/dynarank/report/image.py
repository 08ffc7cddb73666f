"""A picture of the ranks over time, for a README or a talk."""

import math
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from dynarank.history import History
from dynarank.report.facts import last_step
from dynarank.report.plots import MAX_TOGETHER, rank_curves
from dynarank.report.rank_drawing import RankCurve, draw_ranks
from dynarank.report.svg import MID_TONES, theme

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_COLUMNS = 4


def plot_ranks(history: History, path: str | os.PathLike[str]) -> Path:
    """Write a picture of the ranks over time and return its path.

    The background is transparent and the colours are legible on white and on dark. Up to six layers are drawn
    together, more of them side by side.

    Args:
        history: Record with rank events or with ``describe(ranks=...)``.
        path: File to write; its ending (.png, .svg, .pdf) chooses the format.

    Raises:
        ValueError: If the history holds no ranks.
        ImportError: If matplotlib is not installed.
    """
    target = Path(path)
    curves = rank_curves(history)
    if not curves:
        raise ValueError(
            "plot_ranks: the history holds no ranks. Record rank events, or describe(ranks={layer: rank})."
        )
    with theme(MID_TONES):
        from matplotlib.figure import Figure

        target.parent.mkdir(parents=True, exist_ok=True)
        figure = Figure(figsize=(7.2, 3.6), layout="constrained")
        paint = _draw_together if len(curves) <= MAX_TOGETHER else _draw_side_by_side
        paint(figure, curves, end=last_step(history))
        # Without the date, equal runs give equal files.
        metadata = {"Date": None} if target.suffix.lower() == ".svg" else None
        figure.savefig(target, dpi=200, transparent=True, metadata=metadata)
    return target


def _draw_together(figure: "Figure", curves: Mapping[str, RankCurve], *, end: int) -> None:
    axes = figure.subplots()
    draw_ranks(axes, curves, last_step=end, palette=MID_TONES)
    axes.set_ylabel("rank")
    to_axes = axes.transData + axes.transAxes.inverted()
    ends = [float(to_axes.transform((0, curve[-1][1]))[1]) for curve in curves.values()]
    for (layer, curve), height, color in zip(curves.items(), _apart(ends, gap=0.075), MID_TONES.series, strict=False):
        # Beside the end of its line: a legend would leave the matching to the colours.
        label = f"{layer}: {curve[-1][1]}"
        axes.annotate(label, (1.01, height), xycoords="axes fraction", color=color, va="center")


def _draw_side_by_side(figure: "Figure", curves: Mapping[str, RankCurve], *, end: int) -> None:
    rows = math.ceil(len(curves) / _COLUMNS)
    figure.set_size_inches(2.4 * _COLUMNS, 1.6 * rows + 0.3)
    panels = list(figure.subplots(rows, _COLUMNS, squeeze=False).flat)
    for axes, (layer, curve) in zip(panels, curves.items(), strict=False):
        draw_ranks(axes, {layer: curve}, last_step=end, palette=MID_TONES, scale_of=curves)
        axes.set_title(layer, fontsize=9, loc="left")
        axes.label_outer()
    for axes in panels[len(curves) :]:
        axes.set_axis_off()


def _apart(values: Sequence[float], *, gap: float) -> list[float]:
    """Return heights close to the values, in their order, no two nearer than ``gap``.

    Example:
        >>> _apart([5.0, 4.0, 5.0], gap=2.0)
        [6.0, 4.0, 8.0]
    """
    heights = list(values)
    lowest = -math.inf
    for index in sorted(range(len(values)), key=lambda index: values[index]):
        heights[index] = lowest = max(values[index], lowest + gap)
    return heights
