"""A plan keeps its budget, in whatever it is counted, and what it foretells is what is measured afterwards."""

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from dynarank.compress import Compressor, compress_
from dynarank.compress.plan import KEPT
from dynarank.factorize import deployed_parameters, factorize_
from dynarank.layers.base import low_rank_layers
from dynarank.measure import flops, stored_bytes

MATRIX = {"forms": ["matrix"]}


class Recurrent(nn.Module):
    """One layer at every step, one beside it, one that nobody calls, and a head."""

    def __init__(self) -> None:
        super().__init__()
        kind: dict[str, Any] = {"dtype": torch.float64}
        self.step, self.enter, self.idle = (nn.Linear(18, 18, **kind) for _ in range(3))
        self.head = nn.Linear(18, 4, **kind)

    def forward(self, x: Tensor) -> Tensor:
        state = x.new_zeros(18)
        for part in x.unbind(1):
            state = (self.step(state) + self.enter(part)).tanh()
        return self.head(state)


class Convolutions(nn.Module):
    def __init__(self, dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 12, 3, padding=1, dtype=dtype)
        self.norm = nn.BatchNorm2d(12, dtype=dtype)
        self.body = nn.Conv2d(12, 16, (3, 2), stride=2, dtype=dtype)
        self.grouped = nn.Conv2d(16, 16, 3, groups=4, padding=1, dtype=dtype)
        self.fc = nn.Linear(16, 20, dtype=dtype)
        self.head = nn.Linear(20, 5, dtype=dtype)

    def forward(self, x: Tensor) -> Tensor:
        x = self.grouped(self.body(self.norm(self.stem(x)).relu()).relu())
        return self.head(self.fc(x.mean((2, 3))).relu())


def transformer() -> Any:
    layer = nn.TransformerEncoderLayer(16, 2, 40, batch_first=True, dtype=torch.float64)
    encoder = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
    return nn.Sequential(encoder, nn.Linear(16, 3, dtype=torch.float64))


NETWORKS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "recurrent": (Recurrent, (6, 4, 18)),
    "convolutions": (lambda: Convolutions(torch.float64), (4, 3, 9, 8)),
    "transformer": (transformer, (3, 5, 16)),
}


@pytest.fixture(params=NETWORKS.values(), ids=NETWORKS.keys())
def network(request: pytest.FixtureRequest) -> tuple[nn.Module, list[Tensor]]:
    build, shape = request.param
    return build(), [torch.randn(shape, dtype=torch.float64) for _ in range(2)]


def count(model: nn.Module, measure: str, batch: Tensor) -> float:
    if measure == "flops":
        return flops(model, batch)
    return deployed_parameters(model) if measure == "parameters" else stored_bytes(model)


@pytest.mark.parametrize("measure", ["parameters", "bytes", "flops"])
@pytest.mark.parametrize("budget", [0.6, 0.8])
def test_the_model_takes_what_the_report_foretells_and_no_more_than_allowed(network: Any, measure: str, budget: float):
    model, batches = network
    before = count(model, measure, batches[0])
    if measure == "flops" and isinstance(model, nn.Sequential):
        budget += 0.15  # what attention computes stays
    elif isinstance(model, nn.Sequential):
        budget += 0.1
    report = compress_(model, budget, measure=measure, calibration=batches)
    assert report.measure == measure and report.budget == pytest.approx(budget * before)
    assert report.cost_before == before
    assert report.cost_after == count(model, measure, batches[0]) <= report.budget
    assert report.parameters_after == deployed_parameters(model)
    assert report.flops_after == flops(model, batches[0])
    assert report.compressed


@pytest.mark.parametrize("measure", ["parameters", "bytes", "flops"])
@pytest.mark.parametrize("form", ["pair", "core"])
@pytest.mark.parametrize("rank", [{"rank": 10, "rank_multiple": 8}, {"rank": "full"}, {"rank": 7}])
def test_low_rank_layers_count_as_they_are_stored(
    mlp: Any, batches: Any, measure: str, form: Any, rank: dict[str, Any]
):
    model, data = mlp(20, 24, 20, 24, 4), batches(20)
    factorize_(model, **rank)
    for layer in low_rank_layers(model).values():
        layer.set_factors(layer.factors(), form=form)
    before = count(model, measure, data[0])
    report = compress_(model, 0.6, measure=measure, calibration=data)
    assert report.cost_before == before
    assert report.cost_after == count(model, measure, data[0]) <= 0.6 * before
    assert report.parameters_after == deployed_parameters(model)
    assert report.flops_after == flops(model, data[0])


def test_bytes_of_layers_of_several_types_add_up():
    model = nn.Sequential(nn.Linear(30, 30), nn.Linear(30, 30, dtype=torch.float64))
    calibration = [torch.randn(8, 30)]
    forward = lambda model, x: model[1](model[0](x).double())  # noqa: E731
    report = compress_(model, 0.5, measure="bytes", calibration=calibration, include_head=True, forward=forward)
    assert report.cost_after == stored_bytes(model) <= 0.5 * 4 * 930 * 3


@pytest.mark.parametrize("measure", ["parameters", "bytes", "flops"])
def test_above_one_the_budget_is_in_the_unit_of_the_measure(mlp: Any, batches: Any, measure: str):
    model, data = mlp(20, 24, 20, 4), batches(20)
    allowed = round(0.61 * count(model, measure, data[0]))
    report = compress_(model, allowed, measure=measure, calibration=data)
    assert report.budget == allowed
    assert 0.5 * allowed < count(model, measure, data[0]) <= allowed


def test_little_of_the_budget_is_left_unused(mlp: Any, batches: Any):
    model, data = mlp(20, 24, 20, 24, 4), batches(20)
    report = compress_(model, 0.5, calibration=data)
    smallest_step = min(24 + 20, 24 + 20)
    assert report.budget - report.parameters_after < smallest_step


def test_a_budget_of_one_changes_nothing(network: Any, state_of: Any):
    model, batches = network
    before = state_of(model)
    for budget in (1.0, 1, 10**9):
        report = compress_(model, budget, calibration=batches, renew_statistics=False)
        assert not report.compressed and report.parameters_after == report.parameters_before
    assert state_of(model) == before
    assert KEPT in {layer.reason for layer in report.kept}


def test_a_layer_that_could_be_cut_for_nothing_is_not_cut_where_all_fits(mlp: Any):
    model = mlp(20, 24, 20, 4)
    with torch.no_grad():
        model[2].weight.zero_()
    assert not compress_(model, 1.0).compressed


def test_compressed_layers_can_be_compressed_further(network: Any):
    model, batches = network
    sizes = [deployed_parameters(model)]
    for budget in (0.8, 0.7):
        if not isinstance(model, nn.Sequential):
            budget -= 0.1
        allowed = budget * sizes[0]
        report = compress_(model, allowed, calibration=batches)
        assert report.parameters_before == sizes[-1]
        sizes.append(deployed_parameters(model))
        assert sizes[-1] == report.parameters_after <= allowed
    assert sizes[2] < sizes[1] < sizes[0]


def test_from_sixty_to_thirty_percent(mlp: Any, batches: Any):
    model, data = mlp(40, 40, 40, 4), batches(40)
    size = deployed_parameters(model)
    first = compress_(model, 0.6, calibration=data)
    second = compress_(model, 0.3 * size, calibration=data)
    assert deployed_parameters(model) <= 0.3 * size
    ranks = [{layer.name: layer.rank for layer in report.compressed} for report in (first, second)]
    assert all(rank <= ranks[0].get(name, (40,)) for name, rank in ranks[1].items())


# --- what may be replaced ----------------------------------------------------------------------------------------


def replaced(model: nn.Module) -> set[str]:
    return set(low_rank_layers(model))


def test_only_named_layers_are_replaced_and_excluded_ones_are_not(mlp: Any, batches: Any):
    data = batches(20)
    model = mlp(20, 24, 20, 24, 4)
    report = compress_(model, 0.8, calibration=data, target_modules=["2", "6"], **MATRIX)
    assert replaced(model) <= {"2", "6"} and report.compressed
    assert {layer.name: layer.reason for layer in report.kept}["0"] == "not named in target_modules"
    model = mlp(20, 24, 20, 24, 4)
    report = compress_(model, 0.7, calibration=data, exclude_modules=["2"])
    assert "2" not in replaced(model)
    assert {layer.name: layer.reason for layer in report.kept}["2"] == "named in exclude_modules"


def test_the_head_is_replaced_only_if_asked_for(mlp: Any, batches: Any):
    data = batches(20)
    for include in (False, True):
        model = mlp(20, 24, 40)
        compress_(model, 0.8 if not include else 0.3, calibration=data, include_head=include)
        assert ("2" in replaced(model)) is include


@pytest.mark.parametrize("option", [{"exclude_modules": ["0"]}, {"target_modules": ["2"]}])
def test_low_rank_layers_can_be_left_out_as_well(mlp: Any, batches: Any, option: dict[str, Any]):
    model, data = mlp(40, 40, 40, 4), batches(40)
    compress_(model, 0.6, calibration=data)
    left, factors = model[0], {name: p.tolist() for name, p in model[0].named_parameters()}
    report = compress_(model, 0.8, calibration=data, **option)
    assert model[0] is left and {name: p.tolist() for name, p in left.named_parameters()} == factors
    assert [layer.name for layer in report.compressed] == ["2"]
    assert report.layers[0].reason in ("named in exclude_modules", "not named in target_modules")


def test_a_low_rank_head_is_left_as_well(mlp: Any, batches: Any):
    model, data = mlp(40, 40, 40), batches(40)
    compress_(model, 0.5, calibration=data, include_head=True)
    head = model[2]
    report = compress_(model, 0.8, calibration=data)
    assert model[2] is head and report.layers[1].reason.startswith("classifier head")


@pytest.mark.parametrize(("multiple", "narrow"), [(1, [1, 2, 3, 4, 5]), (2, [2, 4]), (4, [1, 2, 3, 4, 5])])
def test_ranks_are_multiples_where_there_is_room_for_two(mlp: Any, multiple: int, narrow: list[int]):
    compressor = Compressor(mlp(40, 40, 6, 4), rank_multiple=multiple, **MATRIX)
    offered = [[rank for (rank,) in known.menu[0][1].ranks] for known in compressor.surveys[:2]]
    assert offered == [list(range(multiple, 20, multiple)), narrow]


# --- what cannot be met ------------------------------------------------------------------------------------------


def test_a_budget_that_cannot_be_met_says_how_close_it_came_and_why(mlp: Any, batches: Any, state_of: Any):
    model, data = mlp(20, 24, 20, 4), batches(20)
    before = state_of(model)
    smallest = 20 + 24 + 24 + 24 + 20 + 20 + 84  # rank 1 in both, their biases, and the head
    share = f"{smallest / deployed_parameters(model):.1%}"
    with pytest.raises(ValueError) as caught:
        compress_(model, 0.15, calibration=data)
    message = str(caught.value)
    assert f"with every layer at its smallest the model still takes {smallest:,} parameters, {share} of" in message
    assert "The model is unchanged." in message
    assert "4 (classifier head, the last layer of nn.Sequential)" in message
    assert state_of(model) == before
    compress_(model, smallest, calibration=data)
    assert deployed_parameters(model) == smallest


@pytest.mark.parametrize(
    ("measure", "unit"), [("parameters", "parameters"), ("bytes", "MB"), ("flops", "MFLOPs"), ("latency", "ms")]
)
def test_every_measure_names_its_unit(mlp: Any, batches: Any, state_of: Any, measure: str, unit: str):
    model, data = mlp(20, 24, 20, 4), batches(20)
    before = state_of(model)
    with pytest.raises(ValueError, match=rf"a budget of [\d,.]+ {unit} cannot be met: .* still takes [\d,.]+ {unit}"):
        compress_(model, 1e-6, measure=measure, calibration=data, timed=1e-4 if measure == "latency" else None)
    assert state_of(model) == before


def test_a_plan_changes_nothing_and_prints_what_its_report_prints(network: Any, state_of: Any):
    model, batches = network
    before = state_of(model)
    compressor = Compressor(model, calibration=batches)
    plans = [compressor.plan(budget) for budget in (0.8, 0.9)]
    assert state_of(model) == before
    assert str(plans[0]) == str(plans[0].report)
    assert plans[0].report.parameters_after <= plans[1].report.parameters_after
    assert compressor.apply_(plans[1], renew_statistics=False) is plans[1].report
    assert deployed_parameters(model) == plans[1].report.parameters_after


def test_a_model_that_has_changed_needs_a_new_look(mlp: Any, batches: Any):
    model = mlp(20, 24, 20, 4)
    compressor = Compressor(model, calibration=batches(20))
    plan = compressor.plan(0.5)
    compressor.apply_(plan)
    for again in (lambda: compressor.plan(0.4), lambda: compressor.apply_(plan)):
        with pytest.raises(RuntimeError, match=r"has changed since the model was looked at. Build a new Compressor"):
            again()


def test_a_plan_can_be_tried_on_a_copy(mlp: Any, batches: Any, state_of: Any):
    model, data = mlp(20, 24, 20, 4), batches(20)
    compressor = Compressor(model, calibration=data)
    before, trial = state_of(model), copy.deepcopy(model)
    plan = compressor.plan(0.5)
    compressor.apply_(plan, model=trial)
    assert state_of(model) == before
    compressor.apply_(plan)
    torch.testing.assert_close(model(data[0]), trial(data[0]), atol=0, rtol=0)
