"""Times of layers between the sizes that were timed, and plans that count them."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from dynarank.compress import Compressor, _survey, compress_
from dynarank.compress import compress as compress_module
from dynarank.compress.forms.base import Options
from dynarank.compress.forms.matrix import Matrix
from dynarank.compress.plan import SLOWER
from dynarank.compress.timing import LayerTimes, interpolated, time_layer
from dynarank.measure import Timing, trace

MATRIX = {"forms": ["matrix"]}


def options_of(layer: nn.Module, x: Tensor) -> tuple[Options, Any]:
    seen = trace(layer, {"layer": layer}, x)["layer"]
    return Matrix().options(layer, None, seen), seen


# --- between measured points -------------------------------------------------------------------------------------


def test_interpolation_is_a_broken_line_constant_beyond_its_ends():
    nodes, values = torch.tensor([1.0, 2.0, 5.0]).double(), torch.tensor([4.0, 0.0, 6.0]).double()
    x = torch.tensor([0.0, 1.0, 1.25, 2.0, 3.0, 5.0, 9.0]).double()
    assert interpolated(x, nodes, values).tolist() == [4.0, 4.0, 3.0, 0.0, 2.0, 6.0, 6.0]


def test_one_point_is_a_constant_and_no_question_no_answer():
    node, value = torch.tensor([3.0]), torch.tensor([7.0])
    assert interpolated(torch.tensor([1.0, 3.0, 9.0]), node, value).tolist() == [7.0, 7.0, 7.0]
    nodes = torch.tensor([1.0, 2.0])
    assert interpolated(torch.empty(0), nodes, nodes).shape == (0,)


@pytest.mark.parametrize("sizes", [(30, 24), (3, 2), (4, 4)])
def test_a_layer_is_timed_as_it_is_and_at_up_to_four_sizes(sizes: tuple[int, int]):
    layer = nn.Linear(*sizes)
    options, seen = options_of(layer, torch.randn(5, sizes[0]))
    times = time_layer(layer, seen, [(Matrix(), options)], seconds=0.0)
    timed, seconds = times.forms["matrix"]
    assert times.present > 0 and bool((seconds > 0).all())
    assert len(timed) == min(4, len(options.ranks))
    assert {float(options.parameters[0]), float(options.parameters[-1])} <= set(timed.tolist())
    found = times.of(options)
    assert found.shape == options.parameters.shape and found.dtype == torch.float64
    at_nodes = {float(p): float(s) for p, s in zip(options.parameters, found, strict=True)}
    assert [at_nodes[size] for size in timed.tolist()] == seconds.tolist()


def test_timing_leaves_the_layer_and_the_generator_alone(state_of: Any):
    model = nn.Sequential(
        nn.Conv2d(3, 12, 3, padding=1), nn.ReLU(), nn.Conv2d(12, 12, 3), nn.Flatten(), nn.Linear(48, 3)
    )
    before, x = state_of(model), torch.ones(2, 3, 4, 4)
    Compressor(model, calibration=[x], timed=1e-5)
    assert state_of(model) == before


# --- plans that count seconds: with times that are known -----------------------------------------------------------


def known_times(monkeypatch: Any, *, present: float, smallest: float, largest: float) -> None:
    """Let every layer take ``present`` as it is, and a replacement a time that grows with its size."""

    def times(layer: Any, seen: Any, menu: Any, *, seconds: float) -> LayerTimes:
        forms = {
            options.form: (options.parameters[[0, -1]].double(), torch.tensor([smallest, largest]).double())
            for _, options in menu
        }
        return LayerTimes(present, forms)

    def latency(models: Any, batch: Any, *, forward: Any) -> Any:
        return {"model": Timing(whole, whole, whole, 1)}

    whole = 3 * present + 1e-3  # two layers that can be replaced, a head, and the rest
    monkeypatch.setattr(_survey, "time_layer", times)
    monkeypatch.setattr(compress_module, "latency", latency)


def test_a_budget_of_latency_is_shared_out_by_seconds(monkeypatch: Any, mlp: Any, batches: Any):
    known_times(monkeypatch, present=4e-3, smallest=1e-3, largest=5e-3)
    model = mlp(20, 20, 20, 4)
    report = compress_(model, 0.7, measure="latency", calibration=batches(20), **MATRIX)
    assert report.cost_before == report.seconds_before == pytest.approx(13e-3)
    assert report.cost_after == pytest.approx(report.seconds_after) and report.cost_after <= 0.7 * 13e-3
    for layer in report.compressed:
        rank, last = layer.rank[0], 9  # the break-even rank of 20 x 20
        assert layer.seconds_before == 4e-3
        assert layer.seconds_after == pytest.approx(1e-3 + (rank - 1) / (last - 1) * 4e-3)
        assert layer.seconds_after < layer.seconds_before
    assert sum(4e-3 - layer.seconds_after for layer in report.compressed) == pytest.approx(13e-3 - report.cost_after)


def test_a_fraction_of_one_changes_nothing_whatever_the_rounding(monkeypatch: Any, mlp: Any, batches: Any):
    for present in (1 / 3 * 1e-3, 0.1, 7e-7):
        with monkeypatch.context() as patch:
            known_times(patch, present=present, smallest=present / 7, largest=present)
            compressor = Compressor(mlp(20, 20, 20, 4), calibration=batches(20), timed=1.0)
            assert not compressor.plan(1.0, measure="latency").report.compressed


def test_what_would_be_slower_stays_as_it_is(monkeypatch: Any, mlp: Any, batches: Any, state_of: Any):
    known_times(monkeypatch, present=4e-3, smallest=5e-3, largest=6e-3)
    model, data = mlp(20, 20, 20, 4), batches(20)
    before = state_of(model)
    for options in ({"measure": "latency"}, {"faster_only": True}):
        with pytest.raises(ValueError, match=rf"cannot be met: .* 0 \({SLOWER}\), 2 \({SLOWER}\), 4 \(classifier head"):
            compress_(model, 0.7, calibration=data, **options)
    assert state_of(model) == before
    assert compress_(model, 0.7, calibration=data, timed=1e-5).compressed


def test_only_sizes_that_are_faster_are_taken(monkeypatch: Any, mlp: Any, batches: Any):
    known_times(monkeypatch, present=4e-3, smallest=1e-3, largest=9e-3)
    for faster_only in (True, False):
        model = mlp(20, 20, 20, 4)
        report = compress_(model, 0.85, calibration=batches(20), timed=1.0, faster_only=faster_only, **MATRIX)
        assert report.parameters_after <= report.budget
        slower = [layer for layer in report.compressed if layer.seconds_after >= layer.seconds_before]
        assert bool(slower) is not faster_only


def test_without_timing_no_seconds_are_told(mlp: Any, batches: Any):
    report = compress_(mlp(20, 20, 20, 4), 0.6, calibration=batches(20))
    assert report.seconds_before is None and report.seconds_after is None
    assert {layer.seconds_after for layer in report.layers} == {None}


# --- with times that are measured --------------------------------------------------------------------------------


@pytest.mark.slow
def test_measured_latency_gives_a_plan_within_the_budget(batches: Any):
    model = nn.Sequential(nn.Linear(600, 600), nn.ReLU(), nn.Linear(600, 600), nn.ReLU(), nn.Linear(600, 4))
    data = batches(600, rows=64, dtype=torch.float32)
    report = compress_(model, 0.8, measure="latency", calibration=data, timed=0.05, **MATRIX)
    assert report.compressed and report.measure == "latency"
    assert report.cost_after == pytest.approx(report.seconds_after)
    assert report.cost_after <= report.budget == pytest.approx(0.8 * report.cost_before)
    assert all(layer.seconds_after < layer.seconds_before for layer in report.compressed)
    assert model(data[0]).shape == (64, 4)
