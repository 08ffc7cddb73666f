"""Cutting a convolution into two one-dimensional ones: exact errors, better than the plain truncation."""

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from dynarank.compress import compress_
from dynarank.compress.forms.matrix import Matrix
from dynarank.compress.forms.spatial import Spatial
from dynarank.factorize import deployed_parameters, to_plain_
from dynarank.layers.conv2d import LowRankConv2d
from dynarank.layers.conv2d_spatial import LowRankSpatialConv2d
from dynarank.measure import Moments, Trace, input_moments, trace

EXACT = {"atol": 1e-9, "rtol": 1e-9}
ODD = {"stride": (2, 1), "padding": (1, 3), "dilation": (1, 2)}
OPTIONS: dict[str, dict[str, Any]] = {
    "odd": ODD,
    "no-bias": {**ODD, "bias": False},
    "valid": {"padding": "valid", "stride": (1, 2)},
    "same": {"padding": "same", "dilation": (2, 1)},
    "reflect": {"padding": (1, 2), "padding_mode": "reflect"},
    "same-circular": {"padding": "same", "padding_mode": "circular"},
}


def convolution(**options: Any) -> nn.Conv2d:
    torch.manual_seed(0)
    return nn.Conv2d(5, 7, (3, 5), **options, dtype=torch.float64)


def images(count: int = 6) -> Tensor:
    """Return inputs with a mean whose neighbouring pixels are alike, as those of images are."""
    return torch.randn(count, 5, 9, 11, dtype=torch.float64).cumsum(-1).cumsum(-2) / 5 + 0.7


def seen_by(layer: nn.Module, x: Tensor) -> tuple[Moments, Trace]:
    return input_moments(layer, {"": layer}, [x])[""], trace(layer, {"": layer}, x)[""]


def output_error(layer: Any, new: nn.Module, x: Tensor) -> float:
    """Return the squared error of the outputs by their square, about their mean where a bias can make up for that."""
    y = layer(x).detach()
    error = (new(x).detach() - y).square().sum()
    centre = 0 if layer.bias is None else y.mean((0, 2, 3), keepdim=True)
    return float(error / (y - centre).square().sum())


def matrix(layer: Any) -> Tensor:
    """Return the weight as ``M[(o, b), (i, a)]``."""
    weight = layer.weight.detach().as_subclass(Tensor)
    return weight.permute(0, 3, 1, 2).reshape(weight.shape[0] * weight.shape[3], -1)


# --- errors --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS.keys())
def test_the_errors_are_those_of_the_outputs(options: Any):
    layer, x = convolution(**options), images()
    moments, seen = seen_by(layer, x)
    offered = Spatial().options(layer, moments, seen)
    assert offered.form == "spatial" and offered.ranks == tuple((r,) for r in range(1, 11))  # 35 * 15 / 50 = 10.5
    found = [output_error(layer, Spatial().build(layer, moments, rank), x) for rank in offered.ranks]
    torch.testing.assert_close(offered.errors, torch.tensor(found, dtype=torch.float64), **EXACT)
    assert bool((offered.errors.diff() < 0).all())


def test_the_errors_are_those_on_unfolded_inputs():
    layer, x = convolution(**ODD, bias=False), images()
    moments, seen = seen_by(layer, x)
    rows = F.unfold(x, layer.kernel_size, layer.dilation, layer.padding, layer.stride).mT.flatten(0, 1)  # (rows, 75)
    offered = Spatial().options(layer, moments, seen)
    for rank, error in zip(offered.ranks, offered.errors.tolist(), strict=True):
        rest = Spatial().build(layer, moments, rank).weight - layer.weight
        found = (rows @ rest.flatten(1).mT).square().sum() / (rows @ layer.weight.flatten(1).mT).square().sum()
        assert float(found.detach()) == pytest.approx(error, abs=1e-9)


def test_without_moments_it_is_the_singular_value_decomposition():
    layer = convolution()
    sigma = torch.linalg.svdvals(matrix(layer))
    offered = Spatial().options(layer, None, None)
    expected = torch.stack([sigma[r:].square().sum() for (r,) in offered.ranks]) / sigma.square().sum()
    torch.testing.assert_close(offered.errors, expected, **EXACT)
    new: Any = Spatial().build(layer, None, (4,))
    U, sigma, Vh = torch.linalg.svd(matrix(layer), full_matrices=False)
    torch.testing.assert_close(matrix(new), U[:, :4] * sigma[:4] @ Vh[:4], **EXACT)
    assert new.bias is layer.bias and not offered.multiplications.any()


@pytest.mark.parametrize("options", [ODD, OPTIONS["no-bias"]])
def test_moments_make_it_better_than_the_plain_truncation(options: Any):
    layer, x = convolution(**options), images()
    moments, _ = seen_by(layer, x)
    for rank in range(1, 15):
        plain = Spatial().build(layer, None, (rank,))
        moved: Any = plain
        if layer.bias is not None:  # the best bias for the plain truncation, so that only directions are compared
            moved.bias = nn.Parameter(layer.bias + (layer(x) - plain(x)).mean((0, 2, 3)))
        assert output_error(layer, Spatial().build(layer, moments, (rank,)), x) < output_error(layer, moved, x)


def test_of_many_options_the_errors_are_interpolated():
    torch.manual_seed(0)
    layer, x = nn.Conv2d(26, 24, 3, padding=1).double(), torch.randn(8, 26, 9, 9, dtype=torch.float64).cumsum(-1)
    moments, seen = seen_by(layer, x)
    offered = Spatial().options(layer, moments, seen)
    assert len(offered.ranks) == 37
    found = [output_error(layer, Spatial().build(layer, moments, rank), x) for rank in offered.ranks]
    torch.testing.assert_close(offered.errors, torch.tensor(found, dtype=torch.float64), atol=0, rtol=0.03)
    for i in (0, 36):  # where they were computed
        assert offered.errors[i].item() == pytest.approx(found[i], rel=1e-6)


# --- replacements --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS.keys())
@pytest.mark.parametrize("calibrated", [False, True])
def test_the_full_rank_reproduces_the_layer(options: Any, calibrated: bool):
    layer, x = convolution(**options), images()
    moments = seen_by(layer, x[:1])[0] if calibrated else None  # fewer rows than columns: a singular metric
    torch.testing.assert_close(Spatial().build(layer, moments, (15,))(x), layer(x), **EXACT)


def test_a_separable_kernel_is_found_at_its_rank():
    layer, x = convolution(**ODD), images()
    with torch.no_grad():
        A, B = torch.randn(7, 2, 5, dtype=torch.float64), torch.randn(2, 5, 3, dtype=torch.float64)
        layer.weight.copy_(torch.einsum("orb,ria->oiab", A, B))
    for moments in (None, seen_by(layer, x)[0]):
        offered = Spatial().options(layer, moments, None)
        assert offered.errors[0] > 1e-2 and offered.errors[1] < 1e-12
        torch.testing.assert_close(Spatial().build(layer, moments, (2,))(x), layer(x), **EXACT)


def test_the_bias_makes_up_for_the_mean():
    layer, x = convolution(**ODD), images() + 3
    new: Any = Spatial().build(layer, seen_by(layer, x)[0], (3,))
    torch.testing.assert_close(new(x).mean((0, 2, 3)), layer(x).mean((0, 2, 3)), **EXACT)
    error = output_error(layer, new, x)
    new.bias = layer.bias
    assert error < output_error(layer, new, x)


def test_a_replacement_is_of_the_same_kind():
    layer, x = convolution().float().eval(), images().float()
    layer.weight.requires_grad_(False)
    moments, _ = seen_by(layer, x)
    new: Any = Spatial().build(layer, moments, (3,))
    assert type(new) is LowRankSpatialConv2d and (new.rank, new.capacity) == (3, 3)
    assert not new.training and not new.A.requires_grad and not new.B.requires_grad and new.bias.requires_grad
    assert {p.dtype for p in new.parameters()} == {torch.float32}
    y = new(x.to(memory_format=torch.channels_last))
    assert y.is_contiguous(memory_format=torch.channels_last)
    torch.testing.assert_close(y, new(x), atol=1e-4, rtol=1e-4)


def test_few_inputs_and_dead_ones_are_no_obstacle():
    layer, x = convolution().float(), images(1).float() + 30
    x[:, 2] = 0
    moments, seen = seen_by(layer, x[..., :7])
    offered = Spatial().options(layer, moments, seen)
    assert bool((offered.errors >= 0).all()) and bool((offered.errors <= 1).all())
    assert all(bool(p.isfinite().all()) for p in Spatial().build(layer, moments, (4,)).parameters())
    nothing = Moments(torch.zeros_like(moments.second), torch.zeros_like(moments.mean), moments.rows)
    assert not Spatial().options(layer, nothing, seen).errors.any()


def test_a_spatial_layer_can_be_cut_further():
    layer, x = convolution(**ODD), images()
    moments, seen = seen_by(layer, x)
    before: Any = Spatial().build(layer, None, (8,))
    offered = Spatial().options(before, moments, seen)
    assert offered.ranks == tuple((r,) for r in range(1, 8))
    new: Any = Spatial().build(before, moments, (3,))
    assert type(new) is LowRankSpatialConv2d and new.rank == 3
    assert output_error(before, new, x) == pytest.approx(float(offered.errors[2]), abs=1e-9)
    one = LowRankSpatialConv2d(5, 7, 3, rank=1)
    assert Spatial().options(one, None, None).ranks == ()


def test_what_it_applies_to():
    form, layer = Spatial(), LowRankSpatialConv2d(4, 4, 3, rank=2)
    assert form.accepts(nn.Conv2d(4, 4, (2, 3))) and form.accepts(layer)
    for other in (
        nn.Conv2d(4, 4, 1),
        nn.Conv2d(4, 4, (1, 3)),
        nn.Conv2d(4, 4, (3, 1)),
        nn.Conv2d(4, 4, 3, groups=2),
        nn.Conv3d(4, 4, 3),
        nn.ConvTranspose2d(4, 4, 3),
        nn.Linear(4, 4),
        LowRankConv2d(4, 4, 3, rank=2),
    ):
        assert not form.accepts(other)
    assert not Matrix().accepts(layer) and Matrix().accepts(LowRankConv2d(4, 4, 3, rank=2))


# --- costs ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS.keys())
@pytest.mark.parametrize("batched", [True, False])
def test_costs_are_those_of_what_is_deployed(options: Any, batched: bool):
    layer, x = convolution(**options), images() if batched else images()[0]
    offered = Spatial().options(layer, None, seen_by(layer, x)[1])
    for i, rank in enumerate(offered.ranks):
        shaped = Spatial().shaped(layer, rank)
        built: Any = Spatial().build(layer, None, rank)
        assert [p.shape for p in shaped.parameters()] == [p.shape for p in built.to_plain().parameters()]
        assert sum(p.numel() for p in shaped.parameters() if p.dim() == 4) == offered.parameters[i]
        with FlopCounterMode(display=False) as counter:
            y = shaped(x)
        assert y.shape == layer(x).shape
        assert counter.get_total_flops() == 2 * int(offered.multiplications[i])


# --- within a budget -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("measure", ["parameters", "flops"])
def test_a_network_is_compressed_within_a_budget(measure: str):
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(3, 12, 3, padding=1),
        nn.ReLU(),
        nn.Conv2d(12, 16, (3, 5), stride=2),
        nn.BatchNorm2d(16),
        nn.AdaptiveAvgPool2d(2),
        nn.Flatten(),
        nn.Linear(64, 5),
    )
    calibration = [torch.randn(16, 3, 11, 12).cumsum(-1) for _ in range(2)]
    before = deployed_parameters(model)
    report = compress_(model, 0.7, measure=measure, calibration=calibration, forms=["spatial"])
    assert report.cost_after <= 0.7 * report.cost_before
    assert deployed_parameters(model) == report.parameters_after < before
    assert any(isinstance(module, LowRankSpatialConv2d) for module in model)
    expected = model.eval()(calibration[0])
    to_plain_(model)
    torch.testing.assert_close(model(calibration[0]), expected, atol=1e-4, rtol=1e-4)
