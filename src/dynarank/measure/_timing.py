"""Times of calls that are compared: measured in turn, so that whatever slows the machine slows all of them."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from itertools import count
from statistics import median, quantiles
from time import perf_counter
from typing import Any

import torch

SHORTEST = 200e-6  # seconds a measurement lasts at least; reading the clock costs a thousandth of that
MOST_REPEATS = 2**20


@dataclass(frozen=True)
class Timing:
    """Seconds one call takes. Where the quartiles of two calls overlap, it is open which one is faster.

    Attributes:
        median: The median over the rounds.
        low: The lower quartile.
        high: The upper quartile.
        rounds: How often it was measured.
    """

    median: float
    low: float
    high: float
    rounds: int


def interleaved(
    calls: Mapping[str, Callable[[], Any]],
    *,
    seconds: float = 1.0,
    rounds: int | None = None,
    min_rounds: int = 5,
    warmup: int = 2,
) -> dict[str, Timing]:
    """Return the time of each call, measured in rounds: all calls in order, then all of them in reverse, and so on.

    A call shorter than 200 microseconds is repeated within a measurement. The number of threads is left as it is: pin
    it to 1 for times that can be compared between machines. To learn what a difference has to exceed, pass one call
    under two names.

    Args:
        calls: Functions of no arguments, by name.
        seconds: About how long to measure in all; the last round is finished.
        rounds: Number of rounds, instead of ``seconds``.
        min_rounds: Least number of rounds where ``rounds`` is not given.
        warmup: Calls of each function before the first measurement.

    Raises:
        ValueError: There are no calls, or a number is out of range.

    Example:
        >>> timings = interleaved({"a": lambda: sum(range(999)), "b": lambda: None}, rounds=3)
        >>> timings["a"].rounds, timings["a"].low <= timings["a"].median <= timings["a"].high
        (3, True)
    """
    _check(calls, seconds, rounds, min_rounds, warmup)
    for _ in range(warmup):
        for function in calls.values():
            function()
    repeats = {name: _repeats(function) for name, function in calls.items()}
    durations: dict[str, list[float]] = {name: [] for name in calls}
    started = perf_counter()
    for done in count():
        if done == rounds or (rounds is None and done >= min_rounds and perf_counter() - started >= seconds):
            break
        for name in calls if done % 2 == 0 else reversed(list(calls)):
            durations[name].append(_measure(calls[name], repeats[name]) / repeats[name])
    return {name: _summarise(values) for name, values in durations.items()}


def _check(
    calls: Mapping[str, Callable[[], Any]], seconds: float, rounds: int | None, min_rounds: int, warmup: int
) -> None:
    if not calls:
        raise ValueError("interleaved needs at least one call, got none.")
    if rounds is not None and rounds < 1:
        raise ValueError(f"rounds must be at least 1, got {rounds}.")
    if min_rounds < 1:
        raise ValueError(f"min_rounds must be at least 1, got {min_rounds}.")
    if warmup < 0:
        raise ValueError(f"warmup must be at least 0, got {warmup}.")
    if not seconds >= 0:
        raise ValueError(f"seconds must be at least 0, got {seconds}.")


def _repeats(function: Callable[[], Any]) -> int:
    """Return how often to call the function in one measurement: doubled until that lasts long enough."""
    repeats = 1
    while repeats < MOST_REPEATS and _measure(function, repeats) < SHORTEST:
        repeats *= 2
    return repeats


def _measure(function: Callable[[], Any], repeats: int) -> float:
    _synchronise()
    started = perf_counter()
    for _ in range(repeats):
        function()
    _synchronise()
    return perf_counter() - started


def _synchronise() -> None:
    if torch.cuda.is_initialized():  # a process that never used a GPU does not touch it here either
        torch.cuda.synchronize()


def _summarise(values: list[float]) -> Timing:
    low, _, high = quantiles(values, n=4, method="inclusive") if len(values) > 1 else values * 3
    return Timing(median(values), low, high, len(values))
