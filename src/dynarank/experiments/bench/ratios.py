"""Ratios of times within the same rounds: how large, how scattered, and whether they say anything."""

from collections.abc import Sequence
from dataclasses import dataclass
from math import sqrt
from statistics import fmean, quantiles
from typing import final


@final
@dataclass(frozen=True)
class Spread:
    """How much one thing takes of another.

    Args:
        median: The median over the rounds of the ratio within a round.
        low: The lower quartile.
        high: The upper quartile.
        first: Lower end of a 95 % interval of the median.
        last: Its upper end.
        mean: The sum of the times over the sum of the other's: larger than the median if some rounds hold work that
            others do not.
    """

    median: float
    low: float
    high: float
    first: float
    last: float
    mean: float

    @property
    def margin(self) -> float:
        """The factor within which, up or down, the whole interval lies: of two equal things, what noise alone makes."""
        return max(self.last, 1 / self.first, 1.0)

    def stands_out(self, margin: float) -> bool:
        """Whether it differs from 1 by more than noise: its median by more than ``margin``, and its interval at all.

        Example:
            >>> Spread(1.1, 1.0, 1.2, 1.05, 1.15, 1.1).stands_out(1.04), Spread(1.1, 1, 1.2, 1, 1.2, 1).stands_out(1.2)
            (True, False)
        """
        return not 1 / margin <= self.median <= margin and not self.first <= 1 <= self.last


def ratio(times: Sequence[float], others: Sequence[float]) -> Spread:
    """Return how much ``times`` take of ``others``, two measurements of the same rounds.

    The interval goes from one order statistic to another, by the binomial distribution, whatever that of the times.

    Example:
        >>> ratio([2.0, 3.0, 3.0], [2.0, 2.0, 4.0])
        Spread(median=1.0, low=0.875, high=1.25, first=0.75, last=1.5, mean=1.0)
    """
    ratios = sorted(time / other for time, other in zip(times, others, strict=True))
    count = len(ratios)
    low, middle, high = quantiles(ratios, n=4, method="inclusive") if count > 1 else ratios * 3
    half = 0.98 * sqrt(count)  # half the width of the interval, in ranks
    first, last = ratios[max(0, int(count / 2 - half))], ratios[min(count - 1, int(count / 2 + half))]
    return Spread(middle, low, high, first, last, fmean(times) / fmean(others))
