"""Axes labelled without mathematical markup, with few ticks and whole steps."""

import math
from typing import TYPE_CHECKING

from dynarank.report.formats import power, short

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.axis import Axis


def label_steps(axes: "Axes", *, last_step: int) -> None:
    """Label the horizontal axis as steps of training, from 0 to the last step on every plot alike."""
    from matplotlib.ticker import FuncFormatter

    whole_numbers(axes.xaxis)
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: short(value).replace(" ", "")))
    axes.set_xlabel("step")
    last_step = max(last_step, 1)
    axes.set_xlim(-0.02 * last_step, 1.03 * last_step)


def whole_numbers(axis: "Axis") -> None:
    """Put ticks at whole numbers only."""
    from matplotlib.ticker import MaxNLocator

    axis.set_major_locator(MaxNLocator(nbins=5, integer=True))


def numbers(axes: "Axes", *, unit: str = "") -> None:
    """Label the vertical axis with short numbers: ``"B"`` for bytes, ``"%"`` for fractions shown as percentages."""
    from matplotlib.ticker import FuncFormatter, MaxNLocator

    if unit == "%":
        label = FuncFormatter(lambda value, _: f"{100 * value:g} %")
    else:
        label = FuncFormatter(lambda value, _: short(value, unit=unit))
    axes.yaxis.set_major_locator(MaxNLocator(nbins=5))
    axes.yaxis.set_major_formatter(label)


def powers_of_ten(axes: "Axes") -> None:
    """Make the vertical axis logarithmic, labelled also where it spans less than a decade."""
    from matplotlib.ticker import FuncFormatter, LogLocator, NullLocator

    axes.set_yscale("log")
    low, high = axes.get_ylim()
    if high < 4 * low:
        low, high = low / 2, high * 2
        axes.set_ylim(low, high)
    subs = (1,) if math.log10(high / low) > 2 else (1, 2, 5)
    axes.yaxis.set_major_locator(LogLocator(subs=subs, numticks=6))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: power(value)))
    axes.yaxis.set_minor_locator(NullLocator())


def powers_of_two(axes: "Axes", *, low: float, high: float) -> None:
    """Make the vertical axis logarithmic from ``low`` to ``high``, its marks powers of two."""
    from matplotlib.ticker import FuncFormatter, LogLocator, NullLocator

    axes.set_yscale("log", base=2)
    axes.set_ylim(low / 1.3, high * 1.15)
    axes.yaxis.set_major_locator(LogLocator(base=2, numticks=8))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axes.yaxis.set_minor_locator(NullLocator())
