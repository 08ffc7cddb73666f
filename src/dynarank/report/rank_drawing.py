"""Drawings of one or several low-rank layers over time: their ranks and their singular values."""

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from dynarank.report.points import spaced
from dynarank.report.svg import Palette
from dynarank.report.ticks import label_steps, powers_of_ten, whole_numbers

if TYPE_CHECKING:
    from matplotlib.axes import Axes

RankCurve = Sequence[tuple[int, int, int]]  # step, rank from there on, candidates from there on
Spectra = Sequence[tuple[int, Sequence[float]]]  # step, singular values at that step

_MAX_EVENTS = 400
_MAX_SPECTRA = 160
_MAX_SINGULAR_VALUES = 32
_SMALLEST = 1e-9  # relative to the largest singular value; what lies below is drawn there


def draw_ranks(axes: "Axes", curves: Mapping[str, RankCurve], *, last_step: int, palette: Palette) -> None:
    """Draw ranks as steps, each with its candidate directions as a light band above.

    Args:
        axes: Axes to draw on.
        curves: Ranks and candidates of each layer, in the order of the colours.
        last_step: Where the lines end.
        palette: Colours.
    """
    for index, curve in enumerate(curves.values()):
        color = palette.series[index % len(palette.series)]
        shown = spaced(curve, limit=_MAX_EVENTS)
        _, rank, candidates = shown[-1]
        steps, ranks, extra = zip(*shown, (max(last_step, 1), rank, candidates), strict=True)
        if any(extra):
            top = [rank + count for rank, count in zip(ranks, extra, strict=True)]
            axes.fill_between(steps, ranks, top, step="post", color=color, alpha=0.28, linewidth=0)
        axes.plot(steps, ranks, drawstyle="steps-post", color=color)
        axes.plot(steps[-1:], ranks[-1:], marker="o", markersize=3.5, color=color, clip_on=False)
    axes.set_ylim(bottom=0)
    axes.margins(x=0.02)
    whole_numbers(axes.yaxis)
    label_steps(axes)


def draw_spectrum(axes: "Axes", spectra: Spectra, *, palette: Palette) -> None:
    """Draw each singular value over time on a logarithmic axis; a dot marks where one was cut.

    Args:
        axes: Axes to draw on.
        spectra: Singular values of one layer over time, descending.
        palette: Colours.
    """
    spectra = spaced(spectra, limit=_MAX_SPECTRA)
    width = max(len(row) for _, row in spectra)
    largest = max((sigma for _, row in spectra for sigma in row if math.isfinite(sigma)), default=0.0)
    for index in _chosen(width):
        strength = 1 - 0.55 * index / width
        for piece in _pieces(spectra, index=index, floor=_SMALLEST * largest):
            _draw_piece(axes, piece, strength=strength, end=spectra[-1][0], palette=palette)
    if largest > 0:
        powers_of_ten(axes)
    label_steps(axes)


def _draw_piece(axes: "Axes", piece: list[tuple[int, float]], *, strength: float, end: int, palette: Palette) -> None:
    steps, values = zip(*piece, strict=True)
    marker = "o" if len(piece) == 1 else None
    axes.plot(steps, values, color=palette.series[0], alpha=strength, linewidth=1.1, marker=marker, markersize=3)
    if steps[-1] < end:
        axes.plot(steps[-1:], values[-1:], color=palette.series[1], marker="o", markersize=2.6)


def _chosen(width: int) -> list[int]:
    """Return indices of singular values: all, or the first ones and ever sparser later ones."""
    if width <= _MAX_SINGULAR_VALUES:
        return list(range(width))
    last = _MAX_SINGULAR_VALUES - 1
    return sorted({round((width - 1) * (index / last) ** 2) for index in range(last + 1)})


def _pieces(spectra: Spectra, *, index: int, floor: float) -> list[list[tuple[int, float]]]:
    """Return the unbroken stretches of time in which singular value ``index`` existed and was positive."""
    pieces: list[list[tuple[int, float]]] = [[]]
    for step, row in spectra:
        if index < len(row) and 0 < row[index] < math.inf:
            pieces[-1].append((step, max(row[index], floor)))
        elif pieces[-1]:
            pieces.append([])
    return [piece for piece in pieces if piece]
