"""Drawings of one or several low-rank layers over time: their ranks and their singular values."""

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from dynarank.report.points import spaced
from dynarank.report.svg import Palette
from dynarank.report.ticks import label_steps, powers_of_ten, powers_of_two, whole_numbers

if TYPE_CHECKING:
    from matplotlib.axes import Axes

RankCurve = Sequence[tuple[int, int, int]]  # step, rank from there on, candidates from there on
Spectra = Sequence[tuple[int, Sequence[float]]]  # step, singular values at that step
Piece = list[tuple[int, float]]  # step, singular value

_MAX_EVENTS = 400
_WIDE = 10  # ratio of the largest to the smallest rank from which on the axis is logarithmic
_MAX_SPECTRA = 160
_MAX_SINGULAR_VALUES = 32
_SMALLEST = 1e-9  # relative to the largest singular value; what lies below is drawn there


def draw_ranks(
    axes: "Axes",
    curves: Mapping[str, RankCurve],
    *,
    last_step: int,
    palette: Palette,
    scale_of: Mapping[str, RankCurve] | None = None,
) -> None:
    """Draw ranks as steps, each with its candidate directions as a light band above.

    Args:
        axes: Axes to draw on.
        curves: Ranks and candidates of each layer, in the order of the colours.
        last_step: Where the lines end.
        palette: Colours.
        scale_of: Curves that the scale must fit, so that drawings side by side can be compared; default: ``curves``.
    """
    for index, curve in enumerate(curves.values()):
        color = palette.series[index % len(palette.series)]
        shown = spaced(curve, limit=_MAX_EVENTS)
        _, rank, candidates = shown[-1]
        steps, ranks, extra = zip(*shown, (max(last_step, 1), rank, candidates), strict=True)
        if any(extra):
            top = [rank + count for rank, count in zip(ranks, extra, strict=True)]
            axes.fill_between(steps, ranks, top, step="post", color=color, alpha=0.22, linewidth=0)
        axes.plot(steps, ranks, drawstyle="steps-post", color=color, marker="o", markevery=[-1], markersize=3.5)
    scaled = curves if scale_of is None else scale_of
    _scale_ranks(axes, [(rank, rank + extra) for curve in scaled.values() for _, rank, extra in curve])
    label_steps(axes, last_step=last_step)


def draw_spectrum(axes: "Axes", spectra: Spectra, *, last_step: int, palette: Palette) -> None:
    """Draw each singular value over time on a logarithmic axis; a dot marks where one was cut.

    Args:
        axes: Axes to draw on.
        spectra: Singular values of one layer over time, descending.
        last_step: Where the axis ends.
        palette: Colours.
    """
    spectra = spaced(spectra, limit=_MAX_SPECTRA)
    width = max(len(row) for _, row in spectra)
    largest = max((sigma for _, row in spectra for sigma in row if math.isfinite(sigma)), default=0.0)
    chosen = [
        (piece, (palette.series[0], 1 - 0.55 * index / width))
        for index in _chosen(width)
        for piece in _pieces(spectra, index=index, floor=_SMALLEST * largest)
    ]
    _draw_pieces(axes, chosen, end=spectra[-1][0], cut_color=palette.series[1])
    if largest > 0:
        powers_of_ten(axes)
    label_steps(axes, last_step=last_step)


def _scale_ranks(axes: "Axes", bands: Sequence[tuple[int, int]]) -> None:
    lowest, highest = min(low for low, _ in bands), max(high for _, high in bands)
    # Where one layer needs a hundred directions and another three, a plain scale shows only the first.
    if lowest >= 1 and highest > _WIDE * lowest:
        powers_of_two(axes, low=lowest, high=highest)
    else:
        axes.set_ylim(0, 1.08 * max(highest, 1))
        whole_numbers(axes.yaxis)


def _draw_pieces(axes: "Axes", pieces: Sequence[tuple[Piece, tuple[str, float]]], *, end: int, cut_color: str) -> None:
    from matplotlib.collections import LineCollection

    colors = [color for _, color in pieces]
    axes.add_collection(LineCollection([piece for piece, _ in pieces], colors=colors, linewidths=1.1))
    for single in (piece for piece, _ in pieces if len(piece) == 1):
        axes.plot(*single[0], color=pieces[0][1][0], marker="o", markersize=3)
    cuts = [piece[-1] for piece, _ in pieces if piece[-1][0] < end]
    axes.plot(*zip(*cuts, strict=True) if cuts else ([], []), "o", color=cut_color, markersize=2.6)
    axes.autoscale_view()


def _chosen(width: int) -> list[int]:
    """Return indices of singular values: all, or the first ones and ever sparser later ones."""
    if width <= _MAX_SINGULAR_VALUES:
        return list(range(width))
    last = _MAX_SINGULAR_VALUES - 1
    return sorted({round((width - 1) * (index / last) ** 2) for index in range(last + 1)})


def _pieces(spectra: Spectra, *, index: int, floor: float) -> list[Piece]:
    """Return the unbroken stretches of time in which singular value ``index`` existed and was positive."""
    pieces: list[Piece] = [[]]
    for step, row in spectra:
        if index < len(row) and 0 < row[index] < math.inf:
            pieces[-1].append((step, max(row[index], floor)))
        elif pieces[-1]:
            pieces.append([])
    return [piece for piece in pieces if piece]
