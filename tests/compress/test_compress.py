"""``compress_`` on all kinds of models: what it keeps, what it carries over, and what it must not depend on."""

import copy
import json
import pickle
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from dynarank.compress import Compressor, compress_
from dynarank.factorize import deployed_parameters
from dynarank.layers.base import AbstractLowRankLayer


class Shared(nn.Module):
    """One layer under two names, two layers with one weight, and two with one bias."""

    def __init__(self) -> None:
        super().__init__()
        kind: dict[str, Any] = {"dtype": torch.float64}
        self.first = nn.Linear(20, 20, **kind)
        self.again = self.first
        self.tied, self.partner = nn.Linear(20, 20, **kind), nn.Linear(20, 20, **kind)
        self.partner.weight = self.tied.weight
        self.left, self.right = nn.Linear(20, 20, **kind), nn.Linear(20, 20, **kind)
        self.right.bias = self.left.bias
        self.head = nn.Linear(20, 4, **kind)

    def forward(self, x: Tensor) -> Tensor:
        x = self.again(self.first(x).relu()).relu()
        x = self.partner(self.tied(x).relu()).relu()
        return self.head(self.right(self.left(x).relu()).relu())


@dataclass
class Answer:
    logits: Tensor
    hidden: Any = None


class Bag(dict[str, Any]):
    """Outputs as a class of its own, which torch's trees do not know."""


class Answering(nn.Module):
    """Returns its outputs in whatever shape it is told."""

    def __init__(self, wrap: Any) -> None:
        super().__init__()
        self.fc = nn.Linear(20, 20, dtype=torch.float64)
        self.head = nn.Linear(20, 4, dtype=torch.float64)
        self.wrap = wrap

    def forward(self, x: Tensor) -> Any:
        return self.wrap(self.head(self.fc(x).relu()))


def low_rank(model: nn.Module) -> set[str]:
    return {n for n, m in model.named_modules(remove_duplicate=False) if isinstance(m, AbstractLowRankLayer)}


# --- what is kept and carried over -------------------------------------------------------------------------------


def test_a_shared_layer_is_replaced_in_both_places_and_tied_tensors_stay_tied(batches: Any):
    model = Shared()
    report = compress_(model, 0.8, calibration=batches(20))
    assert model.first is model.again and isinstance(model.first, AbstractLowRankLayer)
    assert model.tied.weight is model.partner.weight and model.left.bias is model.right.bias
    assert [layer.name for layer in report.layers] == ["first", "tied", "partner", "left", "right", "head"]
    assert [layer.reason for layer in report.layers[1:5]] == [
        "its weight is tied to 'partner'",
        "its weight is tied to 'tied'",
        "its bias is tied to that of another layer",
        "its bias is tied to that of another layer",
    ]
    assert report.parameters_after == deployed_parameters(model) <= report.budget


def test_hooks_attributes_and_flags_are_carried_over(mlp: Any, batches: Any):
    model, data = mlp(20, 24, 20, 4), batches(20)
    calls: list[str] = []
    handle = model[0].register_forward_hook(lambda *_: calls.append("hook"))
    model[0].note = "mine"
    model.train()
    model[2].eval()
    model[0].weight.requires_grad_(False)
    compress_(model, 0.5, calibration=data)
    assert low_rank(model) == {"0", "2"}
    assert model[0].note == "mine"
    assert [module.training for module in model] == [True, True, False, True, True]
    frozen = [name for name, p in model.named_parameters() if not p.requires_grad]
    assert frozen == ["0.A", "0.B"]
    calls.clear()
    model(data[0])
    assert calls == ["hook"]
    handle.remove()
    model(data[0])
    assert calls == ["hook"]


def test_a_hook_that_changes_outputs_counts_when_the_damage_is_measured(mlp: Any, batches: Any):
    data = batches(20)
    model = mlp(20, 24, 20, 4)
    model[2].register_forward_hook(lambda module, args, output: 0 * output)
    report = compress_(model, 0.6, calibration=data)
    assert [layer.damage for layer in report.layers[:2]] == [0, 0]


@pytest.mark.parametrize("part", ["weight", "bias"])
def test_an_optimizer_built_before_says_so(mlp: Any, batches: Any, part: str):
    model, data = mlp(20, 24, 20, 4), batches(20)
    optimizer = torch.optim.SGD([p for name, p in model.named_parameters() if name.endswith(part)], lr=0.1)
    compress_(model, 0.5, calibration=data)
    model(data[0]).square().mean().backward()
    with pytest.raises(RuntimeError, match=f"built before compress_ and still holds {part} of '0'"):
        optimizer.step()


def test_a_bias_that_stays_may_go_on_with_its_optimizer(mlp: Any, batches: Any):
    model = mlp(20, 24, 20, 4)
    optimizer = torch.optim.SGD([p for name, p in model.named_parameters() if name.endswith("bias")], lr=0.1)
    before = {name: p.detach().clone() for name, p in model.named_parameters() if name.endswith("bias")}
    compress_(model, 0.5)  # without calibration biases are not corrected
    model(batches(20)[0]).square().mean().backward()
    optimizer.step()
    after = dict(model.named_parameters())
    assert not any(torch.equal(after[name], bias) for name, bias in before.items())


def test_what_was_compressed_is_copied_saved_and_loaded_as_it_is(mlp: Any, batches: Any):
    model, data = mlp(20, 24, 20, 4), batches(20)
    compress_(model, 0.5, calibration=data)
    y = model(data[0])
    again = mlp(20, 24, 20, 4)
    compress_(again, 0.5, calibration=data)
    again.load_state_dict(model.state_dict())
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model)), again):
        assert torch.equal(other(data[0]), y)


def test_gradients_reach_every_parameter(mlp: Any, batches: Any):
    model, data = mlp(20, 24, 20, 4), batches(20)
    compress_(model, 0.5, calibration=data)
    model(data[0]).square().mean().backward()
    assert all(p.grad is not None and bool(p.grad.isfinite().all()) for p in model.parameters())


@pytest.mark.parametrize("context", [torch.no_grad, torch.inference_mode])
@pytest.mark.parametrize("renew", [True, None])
def test_it_may_be_called_where_gradients_are_off_and_trained_afterwards(
    mlp: Any, batches: Any, context: Any, renew: Any
):
    model = nn.Sequential(mlp(20, 24, 20), nn.BatchNorm1d(20, dtype=torch.float64), mlp(20, 20, 4))
    other, data = copy.deepcopy(model), batches(20)
    with context():
        compress_(model, 0.6, calibration=data, renew_statistics=renew)
    compress_(other, 0.6, calibration=data, renew_statistics=renew)
    assert torch.equal(model(data[0]), other(data[0]))
    model(data[0]).square().mean().backward()
    assert not any(tensor.is_inference() for tensor in (*model.parameters(), *model.buffers()))


class Noisy(nn.Module):
    """Draws random numbers in evaluation mode too, and writes to its input."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(20, 24), nn.BatchNorm1d(24), nn.Linear(24, 20), nn.ReLU(), nn.Linear(20, 4))

    def forward(self, x: Tensor) -> Tensor:
        return self.net(nn.functional.dropout(x.mul_(0.5), 0.1, training=True))


@pytest.mark.parametrize("options", [{}, {"timed": 1e-5}, {"method": "svd"}, {"renew_statistics": True}])
def test_the_generator_and_the_batches_are_left_alone(batches: Any, options: dict[str, Any]):
    model, data = Noisy(), batches(20, dtype=torch.float32)
    before, generator = [batch.clone() for batch in data], torch.get_rng_state()
    compress_(model, 0.6, calibration=data, **options)
    assert torch.equal(torch.get_rng_state(), generator)
    assert all(map(torch.equal, data, before))


# --- what it must not depend on ----------------------------------------------------------------------------------


def test_it_is_the_same_every_time_and_however_little_memory_moments_may_take(mlp: Any, batches: Any):
    model, data = mlp(20, 24, 20, 24, 4), batches(20)
    copies = [copy.deepcopy(model) for _ in range(4)]
    for one, memory in zip(copies, (2**30, 2**30, 8 * 24**2, 1), strict=True):
        compress_(one, 0.5, calibration=data, memory=memory)
    states = [one.state_dict() for one in copies]
    for state in states[1:]:
        assert all(torch.equal(tensor, states[0][name]) for name, tensor in state.items())


def test_mode_and_gradient_of_the_caller_do_not_matter(mlp: Any, batches: Any):
    model = nn.Sequential(mlp(20, 24, 20), nn.BatchNorm1d(20, dtype=torch.float64), nn.Dropout(0.5), mlp(20, 20, 4))
    data, other = batches(20), copy.deepcopy(model).eval()
    compress_(model, 0.6, calibration=data)
    compress_(other, 0.6, calibration=data)
    assert torch.equal(model.eval()(data[0]), other(data[0]))


def test_batches_may_come_in_every_form(mlp: Any, batches: Any):
    data, model = batches(20), mlp(20, 24, 20, 4)
    forms: list[Any] = [
        data,
        iter(data),
        tuple(data),
        [(x, torch.zeros(len(x))) for x in data],
        [[x, "targets"] for x in data],
        [{"input": x} for x in data],
        DataLoader(TensorDataset(torch.cat(data)), batch_size=len(data[0])),
    ]
    outputs = []
    for calibration in forms:
        one = copy.deepcopy(model)
        compress_(one, 0.5, calibration=calibration)
        outputs.append(one(data[0]))
    assert all(torch.equal(y, outputs[0]) for y in outputs)


def test_a_loader_that_shuffles_is_gone_through_once(mlp: Any, batches: Any):
    class Counting(DataLoader[Any]):
        passes = 0

        def __iter__(self) -> Any:
            self.passes += 1
            return super().__iter__()

    loader = Counting(TensorDataset(torch.cat(batches(20, count=4))), batch_size=20, shuffle=True)
    model = mlp(20, 24, 20, 4)
    compressor = Compressor(model, calibration=loader, memory=1)
    for budget in (0.8, 0.5):
        compressor.plan(budget)
    compressor.apply_(compressor.plan(0.5))
    assert loader.passes == 1


@pytest.mark.parametrize(
    "wrap",
    [
        lambda y: {"logits": y, "steps": 3},
        lambda y: (y, None),
        lambda y: [y, y.argmax(-1)],
        lambda y: Answer(y),
        lambda y: Bag(logits=y, cache=None),
        lambda y: Bag(inner=[Answer(y, (y,))]),
        lambda y: torch.cat([y, torch.full_like(y, -torch.inf)], -1),
    ],
    ids=["mapping", "tuple", "list", "dataclass", "unknown mapping", "nested", "masked"],
)
def test_outputs_may_come_in_every_form(batches: Any, wrap: Any):
    data = batches(20)
    plain, wrapped = Answering(lambda y: y), Answering(wrap)
    wrapped.load_state_dict(plain.state_dict())
    reports = [compress_(model, 0.6, calibration=data) for model in (plain, wrapped)]
    assert reports[0].layers[0].damage == pytest.approx(reports[1].layers[0].damage, rel=1e-12)
    assert reports[0].layers[0].damage > 0


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_every_type_stays_what_it_is(mlp: Any, batches: Any, dtype: torch.dtype):
    model, data = mlp(20, 24, 20, 4, dtype=dtype), batches(20, dtype=dtype)
    compress_(model, 0.6, calibration=data)
    assert {p.dtype for p in model.parameters()} == {dtype} == {model(data[0]).dtype}


# --- what is better ----------------------------------------------------------------------------------------------


def test_activation_aware_truncation_is_exact_where_plain_truncation_is_useless():
    torch.manual_seed(1)
    model = nn.Sequential(nn.Linear(24, 20), nn.Tanh(), nn.Linear(20, 4)).double()
    with torch.no_grad():  # large on features that hardly vary, small on the four that carry everything
        model[0].weight[:, 4:] *= 100
    x = torch.randn(200, 24, dtype=torch.float64)
    x[:, 4:] *= 1e-6
    wanted, errors = model(x).detach(), {}
    for method in ("activation_aware", "svd"):
        candidate = copy.deepcopy(model)
        report = compress_(candidate, 0.55, calibration=[x], method=method)
        assert report.layers[0].rank[0] >= 4
        errors[method] = float((candidate(x).detach() - wanted).norm() / wanted.norm())
    assert errors["activation_aware"] < 1e-3 < 0.1 < errors["svd"]


@pytest.mark.parametrize("seed", range(3))
def test_on_uneven_inputs_the_outputs_suffer_less(mlp: Any, seed: int):
    torch.manual_seed(seed)
    model = mlp(30, 30, 30, 6)
    x = torch.randn(300, 30, dtype=torch.float64) * torch.logspace(0, -3, 30, dtype=torch.float64)
    wanted, errors = model(x).detach(), {}
    for method in ("activation_aware", "svd"):
        candidate = copy.deepcopy(model)
        compress_(candidate, 0.5, calibration=[x], method=method)
        errors[method] = float((candidate(x).detach() - wanted).norm())
    assert errors["activation_aware"] < 0.7 * errors["svd"]


def test_the_constant_part_of_outputs_survives_in_the_bias():
    layer = nn.Linear(20, 20, dtype=torch.float64)
    model = nn.Sequential(layer, nn.Linear(20, 3, dtype=torch.float64))
    x = torch.randn(100, 20, dtype=torch.float64) + 10
    before = layer(x).mean(0)
    compress_(model, 0.5, calibration=[x])
    torch.testing.assert_close(model[0](x).mean(0), before, atol=1e-9, rtol=1e-9)


# --- the report --------------------------------------------------------------------------------------------------


def test_the_report_is_json_and_prints_every_layer(mlp: Any, batches: Any):
    model, data = mlp(20, 24, 20, 4), batches(20)
    report = compress_(model, 0.5, calibration=data, timed=1e-5)
    said = json.loads(json.dumps(report.as_dict(), allow_nan=False))
    assert [layer["name"] for layer in said["layers"]] == ["0", "2", "4"]
    assert said["parameters_after"] == deployed_parameters(model)
    lines = str(report).splitlines()
    assert lines[0].split() == ["layer", "kind", "shape", "form", "rank", "before", "after", "error", "damage"]
    assert [line.split()[0] for line in lines[1:4]] == ["0", "2", "4"]
    assert lines[3].endswith("classifier head, the last layer of nn.Sequential")
    assert lines[4].startswith(f"2 of 3 layers compressed; the model goes from {report.parameters_before:,} to")
    assert lines[5].startswith("FLOPs of a forward pass: ") and lines[6].startswith("Time of a forward pass: ")


def test_one_form_may_be_named_alone(batches: Any):
    kind: dict[str, Any] = {"dtype": torch.float64}
    for form in ("matrix", "spatial", "tucker"):
        model = nn.Sequential(nn.Conv2d(6, 16, 3, **kind), nn.ReLU(), nn.Conv2d(16, 16, 3, **kind), nn.Flatten())
        report = compress_(model, 0.7, forms=form, include_head=True, calibration=[torch.randn(2, 6, 6, 6, **kind)])
        assert {layer.form for layer in report.compressed} == {form}


def test_every_layer_says_what_it_became(mlp: Any, batches: Any):
    model, data = mlp(20, 24, 20, 24, 4), batches(20)
    report = compress_(model, 0.7, calibration=data, exclude_modules=["2"])
    for layer in report.layers:
        module: Any = model.get_submodule(layer.name)
        weights = sum(p.numel() for p in module.parameters() if p.dim() > 1)
        assert weights == layer.after <= layer.before
        if layer.form:
            assert (module.rank,) == layer.rank and not layer.reason and 0 < layer.error < 1 and layer.damage >= 0
        else:
            assert layer.reason and layer.after == layer.before and layer.rank == ()
    assert {*report.compressed, *report.kept} == {*report.layers}
    saved = sum(layer.before - layer.after for layer in report.layers)
    assert report.parameters_before - report.parameters_after == saved


def test_without_data_errors_are_those_of_the_weights(mlp: Any):
    model = mlp(20, 24, 20, 4)
    weights = {name: p.detach().clone() for name, p in model.named_parameters()}
    report = compress_(model, 0.5)
    assert report.flops_before is None and "FLOPs" not in str(report)
    for layer in report.compressed:
        W, new = weights[f"{layer.name}.weight"], model.get_submodule(layer.name).weight.detach().as_subclass(Tensor)  # type: ignore[operator]
        assert layer.error == pytest.approx(float((new - W).square().sum() / W.square().sum()), rel=1e-9)
        assert layer.damage == pytest.approx(layer.error)
