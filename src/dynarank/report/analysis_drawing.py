"""Drawings of one weight: its singular values against those of noise, and its error against its size."""

from collections.abc import Sequence
from typing import TYPE_CHECKING

from dynarank.analysis.findings import LayerAnalysis
from dynarank.analysis.spectra import RESOLUTION, Spectrum, noise_curve
from dynarank.compress.report import CompressedLayer
from dynarank.report.svg import Palette
from dynarank.report.ticks import powers_of_ten, whole_numbers

if TYPE_CHECKING:
    from matplotlib.axes import Axes

SIGMA, NOISE, PAYS = range(3)  # colours of the singular values, of the edge of the noise, of the break-even rank
_DASHED = (0, (4, 3))
_SMALLEST = 1e-6  # errors below are not drawn


def draw_singular_values(axes: "Axes", layer: LayerAnalysis, spectrum: Spectrum, *, palette: Palette) -> None:
    """Draw singular values by rank, those of noise of the same level, its edge, and the rank up to which factors pay.

    Args:
        axes: Axes to draw on.
        layer: The weight.
        spectrum: Its spectrum.
        palette: Colours.
    """
    floor = RESOLUTION * spectrum.singular_values[0]
    shown = [(r, s) for r, s in zip(spectrum.ranks, spectrum.singular_values, strict=True) if s > floor]
    if not shown:
        axes.text(0.5, 0.5, "all are 0", ha="center", transform=axes.transAxes)
        return
    marker = "o" if len(shown) < 20 else None
    axes.plot(*zip(*shown, strict=True), color=palette.series[SIGMA], marker=marker, markersize=3)
    noise = spectrum.noise
    if noise.level:
        curve = noise_curve(layer.matrix_shape, noise.level, spectrum.ranks).tolist()
        axes.plot(spectrum.ranks, curve, color=palette.muted, linestyle=_DASHED, linewidth=1.4)
        axes.axhline(noise.threshold, color=palette.series[NOISE], linestyle=_DASHED, linewidth=1.1)
    if 0 < layer.break_even <= spectrum.ranks[-1]:
        axes.axvline(layer.break_even, color=palette.series[PAYS], linestyle=_DASHED, linewidth=1.1)
    powers_of_ten(axes)
    _label(axes, "rank")


def draw_errors(
    axes: "Axes", layer: LayerAnalysis, planned: Sequence[CompressedLayer], *, forms: Sequence[str], palette: Palette
) -> None:
    """Draw the error of each form against the part of the numbers that it keeps, and what the budgets would choose.

    Args:
        axes: Axes to draw on.
        layer: The weight.
        planned: What would become of it, budget by budget.
        forms: All forms in the order of the colours.
        palette: Colours.
    """
    drawn = False
    for curve in layer.curves:
        points = [
            (100 * size / layer.parameters, error)
            for size, error in zip(curve.parameters, curve.errors, strict=True)
            if error > _SMALLEST
        ]
        drawn |= bool(points)
        color = palette.series[forms.index(curve.form) % len(palette.series)]
        marker = "o" if len(points) < 20 else None
        axes.plot(*_columns(points), color=color, marker=marker, markersize=3)
    chosen = [(100 * one.after / layer.parameters, one.error) for one in planned if one.error > _SMALLEST]
    axes.plot(*_columns(chosen), "o", color=palette.ink, markersize=4.5)
    axes.set_xlim(0, 104)
    if drawn:
        powers_of_ten(axes)
    else:
        axes.set_yticks([])
        axes.text(0.5, 0.5, "none at any size", ha="center", transform=axes.transAxes)
    _label(axes, "% of its numbers")


def _label(axes: "Axes", text: str) -> None:
    whole_numbers(axes.xaxis)
    axes.set_xlabel(text)


def _columns(points: Sequence[tuple[float, float]]) -> tuple[list[float], list[float]]:
    return [x for x, _ in points], [y for _, y in points]
