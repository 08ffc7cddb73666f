"""What is measured of a series: time where time is spent, FLOPs and bytes by hand, and who was left out."""

import time
from typing import Any

import pytest
import torch
from torch import nn

from dynarank.experiments.bench import contenders, measuring
from dynarank.experiments.bench.cases.base import Series, mean_square
from dynarank.experiments.bench.config import find_integrator
from dynarank.experiments.bench.measuring import measure_series
from dynarank.experiments.bench.ratios import Spread, ratio
from dynarank.integrators.plain_factors import PlainFactors

CPU = torch.device("cpu")


class Slow(PlainFactors):
    """Plain factors that need 3 ms more."""

    def advance(self, *args: Any, **options: Any) -> Any:
        until = time.process_time() + 3e-3
        while time.process_time() < until:
            pass
        return super().advance(*args, **options)


class Broken(PlainFactors):
    """Fails at the first step."""

    def advance(self, *args: Any, **options: Any) -> Any:
        raise RuntimeError("out of order")


def measure(small: Any, *, series: Series | None = None, **integrators: Any) -> dict[tuple[str, str], dict[str, Any]]:
    found = measure_series(series or small.series()[0], integrators, device=CPU, seconds=0.01)
    return {(entry["method"], entry["rank"]): entry for entry in found["entries"]}


def test_everybody_is_there_at_every_rank(small: Any):
    found = measure_series(small.series()[0], {"muon": find_integrator("tangent_muon")}, device=CPU, seconds=0.01)
    methods = ("plain", "plain again", "muon")
    assert [(entry["method"], entry["rank"]) for entry in found["entries"]] == [
        ("dense", ""),
        ("dense again", ""),
        *((method, rank) for rank in ("3", "2") for method in methods),
    ]
    assert {str(entry["ranks"]) for entry in found["entries"]} == {"{}", "{'0': 3}", "{'0': 2}"}
    assert [entry["rank_part"] for entry in found["entries"][2:]] == 3 * [3 / 9] + 3 * [2 / 9]
    assert found["rounds"] >= 6
    places = [("dense", ""), ("dense again", ""), ("plain", "3"), ("plain", "2")]
    assert [(f["batch"], f["method"], f["rank"]) for f in found["inference"]] == [
        (size, *place) for size in (1, 5) for place in places
    ]
    dense = found["entries"][0]["to_dense"]
    assert dense == dict.fromkeys(dense, 1.0)


def test_time_in_the_update_is_upkeep(small: Any):
    found = measure(small, slow=Slow(), fast=PlainFactors())
    slow, fast = found["slow", "2"], found["fast", "2"]
    assert slow["seconds"]["clock"] >= 3e-3
    assert slow["to_dense"]["median"] > fast["to_dense"]["median"]
    assert slow["upkeep"] > 0.5
    assert slow["upkeep"] * slow["seconds"]["clock"] == pytest.approx(3e-3, rel=0.5)


def test_integrators_are_measured_in_whole_cycles(small: Any, monkeypatch: pytest.MonkeyPatch):
    entry = measure(small, slow=Slow())["slow", "3"]
    assert (entry["steps"], entry["whole_cycles"]) == (3, True)
    monkeypatch.setattr(measuring, "PATIENCE", 0.5)  # of 0.01 seconds; three steps take 9 ms
    entry = measure(small, slow=Slow())["slow", "3"]
    assert (entry["steps"], entry["whole_cycles"]) == (1, False)


def test_who_cannot_train_is_left_out_with_the_reason(small: Any):
    found = measure(small, broken=Broken(), fast=PlainFactors())
    assert found["broken", "2"] == {"method": "broken", "rank": "2", "failed": "RuntimeError: out of order"}
    assert found["fast", "2"]["to_dense"]["median"] > 0


def test_an_integrator_of_several_gradients_is_measured_too(small: Any):
    assert measure(small, bug=find_integrator("unconventional_bug"))["bug", "2"]["seconds"]["clock"] > 0


def test_flops_are_those_of_forward_and_backward(small: Any):
    found = measure(small)
    head = 3 * 9 * 4  # outputs, gradients of the inputs and of the weight
    dense = 2 * 12 * 9 + head  # nobody asks for the gradient of the first inputs
    low = 2 * 12 * 2 + 3 * 2 * 9 + head
    assert found["plain", "2"]["operations"] == low / dense
    inner = Series("inner", lambda: nn.Sequential(nn.Linear(7, 5)), (3, 7), mean_square, [{"0": 2}], inner=True)
    assert measure(small, series=inner)["plain", "2"]["operations"] == 2 * 12 / 35


def test_bytes_by_hand(small: Any):
    lone = Series("lone", lambda: nn.Sequential(nn.Linear(70, 50, bias=False)), (3, 70), mean_square, [{"0": 4}])
    found = measure(small, series=lone, muon=find_integrator("tangent_heavy_ball"))
    weight, pair = 4 * 70 * 50, 4 * 4 * (70 + 50)
    for method, rank, size in (("dense", "", weight), ("plain", "4", pair)):
        memory = found[method, rank]["memory"]
        assert {memory[name] for name in ("parameters", "gradients", "state")} == {size}
        # Weights, gradients, momenta, and what the update makes on its way: at most one more of that size.
        assert 3 * size <= memory["peak"] <= 4 * size + 4 * 3 * 6 * 70
    assert found["muon", "4"]["memory"]["parameters"] == pair


def test_random_factors_replace_the_named_layers_alone(small: Any):
    (series,) = small.series()
    like = series.network()
    model: Any = contenders.low_rank(series, {"0": 2}, like, CPU)
    assert model[0].rank == 2
    assert 0 < float(model[0].weight.detach().norm()) < 10
    torch.testing.assert_close(model[0].bias, like[0].bias)  # type: ignore[index]
    torch.testing.assert_close(dict(model[2].state_dict()), dict(like[2].state_dict()))  # type: ignore[index]
    with pytest.raises(ValueError, match="no_such_layer"):
        contenders.low_rank(series, {"no_such_layer": 2}, like, CPU)


def test_images_are_laid_out_as_asked():
    series = Series("a", lambda: nn.Conv2d(3, 4, 3), (2, 3, 8, 8), mean_square, [], channels_last=True)
    batch = contenders.make_batch(series, CPU)
    assert batch.is_contiguous(memory_format=torch.channels_last) and not batch.is_contiguous()


def test_the_generator_is_left_alone(small: Any):
    before = torch.random.get_rng_state()
    measure(small)
    assert torch.equal(before, torch.random.get_rng_state())


def test_a_ratio_is_that_within_rounds():
    found = ratio([2.0, 4.0, 8.0, 16.0, 32.0, 64.0], [1.0, 2.0, 4.0, 8.0, 16.0, 1.0])  # the machine slows down
    assert (found.median, found.low, found.high, found.first, found.last) == (2.0, 2.0, 2.0, 2.0, 64.0)
    assert found.mean == 126 / 32
    many = ratio([float(n) for n in range(1, 101)], 100 * [1.0])
    assert (many.median, many.first, many.last) == (50.5, 41.0, 60.0)  # ranks 50 -+ 0.98 * 10, from 0


@pytest.mark.parametrize(
    ("median", "first", "last", "stands_out"),
    [(1.2, 1.15, 1.25, True), (1.04, 1.02, 1.06, False), (1.2, 0.9, 1.4, False), (0.9, 0.85, 0.92, True)],
)
def test_what_stands_out_of_noise(median: float, first: float, last: float, stands_out: bool):
    assert Spread(median, 0, 0, first, last, 0).stands_out(1.05) == stands_out


def test_noise_counts_up_and_down():
    assert Spread(1, 1, 1, 0.8, 1.1, 1).margin == 1.25
    assert Spread(1, 1, 1, 1.01, 1.3, 1).margin == 1.3
