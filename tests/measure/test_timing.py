"""The order and the number of measured calls, by a clock that only the calls move."""

import time
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from dynarank.measure import Timing, Trace, interleaved, latency, layer_latency
from dynarank.measure import _timing as timing


class Clock:
    """A clock in steps of 2^-20 seconds, so that differences are exact."""

    TICK = 2.0**-20

    def __init__(self) -> None:
        self.now = 0.0
        self.log: list[str] = []

    def task(self, name: str, *ticks: int) -> Callable[[], None]:
        """Return a call that lasts ``ticks``, the next of them at each call and the last of them ever after."""
        left = list(ticks)

        def run() -> None:
            self.log.append(name)
            self.now += self.TICK * (left.pop(0) if len(left) > 1 else left[0])

        return run


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(timing, "perf_counter", lambda: clock.now)
    return clock


def test_the_order_turns_around_in_every_round(clock: Clock):
    calls = {name: clock.task(name, 1000) for name in "abc"}
    interleaved(calls, rounds=3, warmup=0)
    assert "".join(clock.log) == "abc" + "abc" + "cba" + "abc"  # first one call each to see how long it takes


def test_warm_up_calls_come_first(clock: Clock):
    interleaved({name: clock.task(name, 1000) for name in "ab"}, rounds=1, warmup=2)
    assert "".join(clock.log) == "abab" + "ab" + "ab"


def test_short_calls_are_repeated_within_a_measurement(clock: Clock):
    found = interleaved({"short": clock.task("s", 10), "long": clock.task("l", 500)}, rounds=1, warmup=0)
    # 200 microseconds are 209.7 ticks: 1, 2, 4, 8, 16 and 32 calls of 10 ticks to find that out
    assert "".join(clock.log) == 63 * "s" + "l" + 32 * "s" + "l"
    assert found["short"] == Timing(*3 * [10 * Clock.TICK], 1)
    assert found["long"] == Timing(*3 * [500 * Clock.TICK], 1)


def test_a_clock_that_stands_still_does_not_hang(clock: Clock, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(timing, "MOST_REPEATS", 8)
    assert interleaved({"a": clock.task("a", 0)}, rounds=2, warmup=0)["a"].median == 0


def test_median_and_quartiles(clock: Clock):
    found = interleaved({"a": clock.task("a", 999, 500, 300, 400, 900, 800)}, rounds=5, warmup=0)["a"]
    assert found == Timing(500 * Clock.TICK, 400 * Clock.TICK, 800 * Clock.TICK, 5)


@pytest.mark.parametrize(("seconds", "min_rounds", "rounds"), [(0, 5, 5), (0, 1, 1), (10, 5, 10), (9.5, 5, 10)])
def test_rounds_fill_the_time(clock: Clock, seconds: float, min_rounds: int, rounds: int):
    calls = {name: clock.task(name, 2**19) for name in "ab"}  # half a second each
    found = interleaved(calls, seconds=seconds, min_rounds=min_rounds)
    assert {t.rounds for t in found.values()} == {rounds}


def test_rounds_win_over_seconds(clock: Clock):
    assert interleaved({"a": clock.task("a", 2**20)}, seconds=1, rounds=3, min_rounds=7)["a"].rounds == 3


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"rounds": 0}, "rounds must be at least 1, got 0"),
        ({"min_rounds": 0}, "min_rounds must be at least 1, got 0"),
        ({"warmup": -1}, "warmup must be at least 0, got -1"),
        ({"seconds": -1.0}, "seconds must be at least 0, got -1.0"),
        ({"seconds": float("nan")}, "seconds must be at least 0, got nan"),
    ],
)
def test_numbers_out_of_range_are_refused(options: dict[str, Any], message: str):
    with pytest.raises(ValueError, match=message):
        interleaved({"a": lambda: None}, **options)


def test_the_clock_of_the_process_does_not_count_a_wait():
    calls = {"wait": lambda: time.sleep(0.01)}
    wall, cpu = (interleaved(calls, rounds=3, warmup=0, clock=clock)["wait"] for clock in ("wall", "cpu"))
    assert wall.median >= 0.01 > 5 * cpu.median > 0


def test_each_clock_is_read_for_itself(clock: Clock, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(timing, "process_time", lambda: 3 * clock.now)  # three threads
    calls = {name: clock.task(name, 400) for name in "ab"}
    for name, ticks in (("wall", 400), ("cpu", 1200)):
        found = interleaved(calls, rounds=2, clock=name)  # type: ignore[arg-type]
        assert {timing.median / Clock.TICK for timing in found.values()} == {ticks}


def test_samples_are_those_of_each_round(clock: Clock):
    calls = {"a": clock.task("a", 999, 500, 300, 400), "b": clock.task("b", 800)}
    found = timing.sampled(calls, rounds=3, warmup=0)
    assert [sample.wall / Clock.TICK for sample in found["a"]] == [500, 300, 400]
    assert [sample.wall / Clock.TICK for sample in found["b"]] == [800, 800, 800]
    assert {sample.gpu for samples in found.values() for sample in samples} == {None}


def test_an_unknown_clock_is_refused():
    with pytest.raises(ValueError, match="clock must be 'wall' or 'cpu', got 'gpu'"):
        interleaved({"a": lambda: None}, clock="gpu")  # type: ignore[arg-type]


def test_nothing_to_measure_is_refused():
    with pytest.raises(ValueError, match="at least one call"):
        interleaved({})


class Spy(nn.Module):
    """Notes how it is called and takes its time on the clock."""

    def __init__(self, clock: Clock) -> None:
        super().__init__()
        self.clock = clock
        self.table: Tensor | None = None
        self.weight = nn.Parameter(torch.ones(()))
        self.seen: list[tuple[Any, ...]] = []

    def forward(self, x: Tensor) -> Tensor:
        self.clock.now += 1
        if self.table is None:
            self.table = torch.ones(())
        last = x.dim() == 4 and x.is_contiguous(memory_format=torch.channels_last) and not x.is_contiguous()
        self.seen.append((tuple(x.shape), x.dtype, last, self.training, torch.is_inference_mode_enabled()))
        return x * self.weight * self.table


def test_latency_runs_all_models_in_inference_and_leaves_them_as_they_were(clock: Clock):
    models = {"a": Spy(clock), "b": Spy(clock).eval()}
    found = latency(models, (torch.zeros(2, 3), "targets"), rounds=4)
    assert {t.rounds for t in found.values()} == {4}
    for model in models.values():
        assert len(model.seen) == 1 + 2 + 1 + 4  # the first call, two to warm up, one for its length, four rounds
        assert {mode for *_, mode, _ in model.seen} == {False}
        assert [inference for *_, inference in model.seen] == [False] + 7 * [True]
    assert models["a"].training and not models["b"].training


def test_a_model_can_be_trained_after_its_latency_was_measured(clock: Clock):
    model = Spy(clock)
    latency({"a": model}, torch.ones(2), rounds=1)
    model(torch.ones(2)).sum().backward()  # a table made in inference mode could not be saved for this
    assert model.weight.grad is not None


def test_latency_leaves_models_as_they_were_after_an_error(attention: Any, state_of: Any):
    before = state_of(attention)
    with pytest.raises(RuntimeError):
        latency({"a": attention}, torch.zeros(2, 5, 7, dtype=torch.float64), rounds=1)
    assert state_of(attention) == before


def test_layer_latency_replays_the_calls_of_the_trace(clock: Clock):
    layers = {"a": Spy(clock), "b": Spy(clock)}
    seen = Trace(rows=0, calls=3, inputs=((2, 3), (1, 3, 4, 5), (2, 3)), channels_last=True)
    found = layer_latency(layers, seen, dtype=torch.bfloat16, device="cpu", seconds=0)
    assert found["a"] == found["b"] == Timing(3.0, 3.0, 3.0, 5)
    for layer in layers.values():
        shapes = sorted(entry[0] for entry in layer.seen[:3])
        assert shapes == [(1, 3, 4, 5), (2, 3), (2, 3)]
        assert {entry[1:] for entry in layer.seen if len(entry[0]) == 4} == {(torch.bfloat16, True, False, True)}
        assert layer.training


def test_layer_latency_needs_a_call(clock: Clock):
    with pytest.raises(ValueError, match="the layer was never called"):
        layer_latency({"a": Spy(clock)}, Trace(0, 0, ()), dtype=torch.float32, device="cpu")
