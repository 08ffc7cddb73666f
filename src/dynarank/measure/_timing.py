"""Times of calls that are compared: measured in turn, so that whatever slows the machine slows all of them."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from itertools import count
from statistics import median, quantiles
from time import perf_counter, process_time
from typing import Any, Literal

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


@dataclass(frozen=True)
class Sample:
    """Seconds one call took in one round, by several clocks.

    Attributes:
        wall: On the wall.
        cpu: Of all threads of this process together: what other processes do does not count, a wait does not either.
        gpu: Between two events on the current stream of the GPU; None where the process uses none.
    """

    wall: float
    cpu: float
    gpu: float | None = None


def interleaved(
    calls: Mapping[str, Callable[[], Any]],
    *,
    seconds: float = 1.0,
    rounds: int | None = None,
    min_rounds: int = 5,
    warmup: int = 2,
    clock: Literal["wall", "cpu"] = "wall",
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
        clock: ``"wall"``, or ``"cpu"`` for the time of all threads of this process, which says nothing of a GPU.

    Raises:
        ValueError: There are no calls, a number is out of range, or there is no such clock.

    Example:
        >>> timings = interleaved({"a": lambda: sum(range(999)), "b": lambda: None}, rounds=3)
        >>> timings["a"].rounds, timings["a"].low <= timings["a"].median <= timings["a"].high
        (3, True)
    """
    if clock not in ("wall", "cpu"):
        raise ValueError(f"clock must be 'wall' or 'cpu', got {clock!r}.")
    found = sampled(calls, seconds=seconds, rounds=rounds, min_rounds=min_rounds, warmup=warmup)
    return {name: summarise([getattr(sample, clock) for sample in samples]) for name, samples in found.items()}


def sampled(
    calls: Mapping[str, Callable[[], Any]],
    *,
    seconds: float = 1.0,
    rounds: int | None = None,
    min_rounds: int = 5,
    warmup: int = 2,
) -> dict[str, list[Sample]]:
    """Return what `interleaved` measures, round by round and by every clock: for ratios within a round.

    Example:
        >>> samples = sampled({"a": lambda: sum(range(999)), "b": lambda: None}, rounds=3)
        >>> len(samples["a"]), samples["a"][0].cpu > 0
        (3, True)
    """
    _check(calls, seconds, rounds, min_rounds, warmup)
    for _ in range(warmup):
        for function in calls.values():
            function()
    repeats = {name: _repeats(function) for name, function in calls.items()}
    found: dict[str, list[Sample]] = {name: [] for name in calls}
    started = perf_counter()
    for done in count():
        if done == rounds or (rounds is None and done >= min_rounds and perf_counter() - started >= seconds):
            break
        for name in calls if done % 2 == 0 else reversed(list(calls)):
            found[name].append(_measure(calls[name], repeats[name]))
    return found


def summarise(values: list[float]) -> Timing:
    """Return the median and the quartiles of what was measured in each round."""
    low, _, high = quantiles(values, n=4, method="inclusive") if len(values) > 1 else values * 3
    return Timing(median(values), low, high, len(values))


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
    while repeats < MOST_REPEATS and repeats * _measure(function, repeats).wall < SHORTEST:
        repeats *= 2
    return repeats


def _measure(function: Callable[[], Any], repeats: int) -> Sample:
    """Return the time of one of ``repeats`` calls."""
    before, after = _synchronised_events()
    wall, cpu = perf_counter(), process_time()
    if before is not None:
        before.record()
    for _ in range(repeats):
        function()
    if after is not None:
        after.record()
        torch.cuda.synchronize()
    wall, cpu = perf_counter() - wall, process_time() - cpu
    gpu = 1e-3 * before.elapsed_time(after) / repeats if before is not None else None
    return Sample(wall / repeats, cpu / repeats, gpu)


def _synchronised_events() -> Any:
    """Return two events after waiting for the GPU, or twice None: a process that never used one does not touch it."""
    if not torch.cuda.is_initialized():
        return None, None
    torch.cuda.synchronize()
    return torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
