"""The analysis of a module: every weight, with and without calibration, and what budgets come to."""

import math

import pytest
import torch
from torch import nn

from dynarank.analysis import analyze
from dynarank.compress import Compressor
from dynarank.factorize import deployed_parameters, factorize_
from dynarank.measure import flops, stored_bytes


def network() -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(3, 9, 3), nn.ReLU(), nn.Flatten(), nn.Linear(9 * 16, 21), nn.ReLU(), nn.Linear(21, 13)
    )


def integers() -> nn.Sequential:
    model = nn.Sequential(nn.Linear(4, 4))
    model[0].weight = nn.Parameter(torch.ones(4, 4, dtype=torch.int8), requires_grad=False)
    return model


def batches() -> list[torch.Tensor]:
    return [torch.randn(16, 3, 6, 6) for _ in range(2)]


class Mixed(nn.Module):
    """Layers of which some cannot be replaced."""

    def __init__(self) -> None:
        super().__init__()
        self.tokens = nn.Embedding(11, 16)
        self.attention = nn.MultiheadAttention(16, 2)
        self.grouped = nn.Conv1d(16, 16, 3, groups=4)
        self.head = nn.Linear(16, 11)
        self.head.weight = self.tokens.weight
        self.up = nn.Linear(16, 40)


def test_every_weight_is_told_by_a_plain_computation():
    model = network()
    found = analyze(model)
    assert [layer.name for layer in found.layers] == ["0", "3", "5"]
    for layer in found.layers:
        W = model.get_submodule(layer.name).weight.detach().double().flatten(1)
        sigma = torch.linalg.svdvals(W)
        assert layer.matrix_shape == tuple(W.shape)
        assert layer.spectrum.singular_values == pytest.approx(sigma.tolist(), rel=1e-6)
        assert layer.break_even == (W.numel() - 1) // sum(W.shape)
        assert (layer.sensitivity, layer.rows, layer.flops, layer.seconds) == (None, None, None, None)
    assert found["0"].shape == (9, 3, 3, 3)
    assert (found["0"].kind, found["3"].kind) == ("conv2d", "linear")
    assert (found.parameters, found.bytes) == (deployed_parameters(model), stored_bytes(model))


def test_the_curve_of_the_matrix_form_is_error_against_size():
    found = analyze(network(), forms=["matrix"])
    for layer in found.layers:
        m, n = layer.matrix_shape
        (curve,) = layer.curves
        assert curve.parameters == tuple(r * (m + n) for (r,) in curve.ranks)
        errors = dict(zip(layer.spectrum.ranks, layer.spectrum.errors, strict=True))
        assert curve.errors == pytest.approx([errors[r] for (r,) in curve.ranks], abs=1e-9)
        assert curve.damages == curve.errors
        assert curve.seconds == ()


def test_outlooks_are_the_plans_of_the_compressor():
    model = network()
    found = analyze(model, budgets=(0.75, 0.4))
    compressor = Compressor(model, include_head=True)
    for outlook in found.outlooks:
        report = compressor.plan(outlook.budget).report
        assert outlook.plan == report
        assert outlook.damage == pytest.approx(sum(layer.damage for layer in report.layers))
        saved = report.parameters_before - report.parameters_after
        assert outlook.bytes == found.bytes - 4 * saved
        assert report.parameters_after <= outlook.budget * found.parameters
    assert found.outlooks[0].damage < found.outlooks[1].damage


def test_a_budget_may_be_a_number_of_parameters():
    model = network()
    share, number = analyze(model, budgets=(0.5, deployed_parameters(model) // 2)).outlooks
    assert share.plan.layers == number.plan.layers


def test_a_budget_that_cannot_be_met_says_how_close_it_came():
    good, bad = analyze(network(), budgets=(0.5, 0.01)).outlooks
    assert (good.problem, bad.plan, bad.damage, bad.bytes, bad.speed_up) == ("", None, None, None, None)
    assert bad.problem.startswith("cannot be met: with every layer at its smallest it is ")


def test_the_model_is_left_as_it_is():
    model = network()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    model[1].eval()
    flags = [module.training for module in model.modules()]
    analyze(model, calibration=batches())
    assert [module.training for module in model.modules()] == flags
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, before[name])


def test_calibration_tells_errors_of_outputs():
    model, data = network().double(), [batch.double() for batch in batches()]
    layer = analyze(model, calibration=data, forms=["matrix"])["3"]
    x = torch.cat([model[:3](batch) for batch in data]).detach()
    y = x @ model[3].weight.detach().T
    y = y - y.mean(0)  # the bias takes the part of the mean
    energies = torch.linalg.svdvals(y).square()
    errors = 1 - energies.cumsum(0) / energies.sum()
    (curve,) = layer.curves
    assert curve.errors == pytest.approx([float(errors[r - 1]) for (r,) in curve.ranks], abs=1e-9)


def test_calibration_tells_rows_operations_and_sensitivities():
    model, data = network(), batches()
    found = analyze(model, calibration=data)
    assert found.calibrated
    assert found.flops == flops(model, data[0])
    assert sum(layer.flops for layer in found.layers) == found.flops
    assert [layer.rows for layer in found.layers] == [16 * 16, 16, 16]
    assert all(layer.sensitivity > 0 for layer in found.layers)
    assert all(outlook.plan.flops_after < found.flops for outlook in found.outlooks if outlook.plan)
    assert found.outlooks[0].speed_up is None


def test_without_measured_sensitivity_there_is_none():
    found = analyze(network(), calibration=batches(), measured_sensitivity=False)
    assert {layer.sensitivity for layer in found.layers} == {None}


def test_timing_tells_seconds_of_layers_options_and_model():
    found = analyze(network(), calibration=batches(), timed=0.001, budgets=(0.5,))
    assert found.seconds > 0
    assert all(layer.seconds > 0 for layer in found.layers)
    assert all(len(curve.seconds) == len(curve.errors) for layer in found.layers for curve in layer.curves)
    assert found.outlooks[0].speed_up == pytest.approx(found.seconds / found.outlooks[0].plan.seconds_after)


def test_what_cannot_be_replaced_is_listed_with_its_reason():
    found = analyze(Mixed())
    assert {layer.name: layer.reason.split(",")[0] for layer in found.layers} == {
        "tokens": "an embedding: its rows are looked up",
        "attention.in_proj_weight": "MultiheadAttention has no low-rank twin",
        "attention.out_proj": found["attention.out_proj"].reason,
        "grouped": "grouped convolution (groups=4)",
        "head": "its weight is tied to 'tokens'",
        "up": "",
    }
    assert all(layer.spectrum is not None for layer in found.layers)
    assert found["attention.in_proj_weight"].shape == (48, 16)
    assert all(not layer.curves for layer in found.layers if layer.reason)


def test_a_low_rank_layer_is_told_by_its_product():
    model = network()
    factorize_(model, rank=4, include_head=True)
    found = analyze(model)
    for layer in found.layers:
        assert layer.rank == 4
        W = model.get_submodule(layer.name).to_dense().weight.detach().double().flatten(1)
        sigma = torch.linalg.svdvals(W)
        assert layer.spectrum.singular_values[:4] == pytest.approx(sigma[:4].tolist(), rel=1e-5)
        assert layer.spectrum.rank_99 <= 4
        assert layer.spectrum.noise.above == 4
        assert layer.parameters == 4 * sum(layer.matrix_shape)
    assert "low-rank already, rank 4" in str(found)


def test_a_single_layer_and_one_too_small_are_analysed_all_the_same():
    found = analyze(nn.Linear(5, 7), budgets=(1.0, 0.5))
    assert "it is the model itself" in found.layers[0].reason
    assert (found.outlooks[0].problem, found.outlooks[0].damage) == ("", 0)
    assert "100.0 %" in found.outlooks[1].problem
    assert analyze(nn.Sequential(nn.Linear(2, 2)))["0"].reason.startswith("too small")


def test_weights_of_other_kinds_are_listed_and_not_analysed():
    model = nn.Sequential(nn.ReLU(), nn.Linear(8, 8), nn.Linear(4, 3), nn.Linear(4, 4))
    model[2].weight = nn.Parameter(torch.ones(3, 0))
    model[3].weight = nn.Parameter(torch.ones(4, 4, dtype=torch.int8), requires_grad=False)
    found = analyze(model)
    assert found["2"].reason == "its weight is empty"
    assert found["3"].reason == "its numbers are int8, not plain floating-point ones: dequantise them first"
    assert found["2"].spectrum is found["3"].spectrum is None


def test_names_choose_layers():
    found = analyze(network(), target_modules=["3"], budgets=(0.9,))
    assert [bool(layer.reason) for layer in found.layers] == [True, False, True]
    found = analyze(network(), exclude_modules=["3"], include_head=False)
    assert found["3"].reason == "named in exclude_modules"
    assert found["5"].reason.startswith("classifier head")


@pytest.mark.parametrize(
    ("model", "options", "error", "message"),
    [
        (network().to("meta"), {}, ValueError, "analyze needs weights, but '0.weight' and 5 more are on the meta"),
        (nn.Sequential(nn.ReLU()), {}, ValueError, "analyze: Sequential has no weight of two or more dimensions."),
        (nn.Sequential(nn.LazyLinear(3)), {}, ValueError, "analyze needs weights, but '0.weight' is lazy"),
        (integers(), {}, ValueError, r"analyze: no weight can be analysed\. The first is 0 \(weights of dtype"),
        (network(), {"calibration": []}, ValueError, "analyze: calibration holds no batch."),
        (network(), {"timed": 0.1}, ValueError, "analyze: timed needs calibration data"),
        (
            network(),
            {"budgets": (0.5, 0)},
            ValueError,
            r"budgets must be fractions in \(0, 1\] or numbers above 1, got 0",
        ),
        (network(), {"budgets": (math.nan,)}, ValueError, "budgets must be fractions"),
        (network(), {"forms": ["square"]}, ValueError, "unknown form 'square'"),
        (network(), {"target_modules": ["fc"]}, ValueError, "target_modules: 'fc' matches no layer"),
        (3, {}, TypeError, "analyze takes a module, a path or tensors by name, got int."),
    ],
)
def test_mistakes_are_named(model, options, error, message):
    with pytest.raises(error, match=message):
        analyze(model, **options)


@pytest.mark.parametrize("bad", [math.nan, math.inf])
@pytest.mark.parametrize("name", ["tokens", "up"])
def test_a_weight_that_is_not_finite_is_named(name, bad):
    model = Mixed()
    with torch.no_grad():
        model.get_submodule(name).weight[1, 1] = bad
    with pytest.raises(ValueError, match=rf"^analyze: {name}.weight holds NaN or infinity\."):
        analyze(model)
