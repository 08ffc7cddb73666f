"""A convolution between fewer channels: exact errors, a path of growing ranks, layers that train and deploy."""

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from dynarank.compress import compress_
from dynarank.compress.forms.tucker import Tucker
from dynarank.factorize import deployed_parameters, to_plain_
from dynarank.layers.base import low_rank_layers
from dynarank.layers.conv2d import LowRankConv2d
from dynarank.measure import Moments, Trace, input_moments, trace

EXACT = {"atol": 1e-9, "rtol": 1e-9}
ODD = {"stride": (2, 1), "padding": (1, 3), "dilation": (1, 2)}
OPTIONS: dict[str, dict[str, Any]] = {
    "odd": ODD,
    "no-bias": {**ODD, "bias": False},
    "same": {"padding": "same", "dilation": (2, 1)},
    "reflect": {"padding": (1, 2), "padding_mode": "reflect"},
}


def convolution(**options: Any) -> nn.Conv2d:
    torch.manual_seed(0)
    return nn.Conv2d(5, 7, (3, 5), **options, dtype=torch.float64)


def images(count: int = 6) -> Tensor:
    """Return inputs with a mean, whose channels and neighbouring pixels are alike."""
    mix = torch.eye(5, dtype=torch.float64) + 0.5
    pixels = torch.randn(count, 5, 9, 11, dtype=torch.float64).cumsum(-1) / 3 + 0.7
    return torch.einsum("ij,njhw->nihw", mix, pixels)


def seen_by(layer: nn.Module, x: Tensor) -> tuple[Moments, Trace]:
    return input_moments(layer, {"": layer}, [x])[""], trace(layer, {"": layer}, x)[""]


def output_error(layer: Any, new: nn.Module, x: Tensor) -> float:
    """Return the squared error of the outputs by their square, about their mean where a bias can make up for that."""
    y = layer(x).detach()
    centre = 0 if layer.bias is None else y.mean((0, 2, 3), keepdim=True)
    return float((new(x).detach() - y).square().sum() / (y - centre).square().sum())


def weight_of(new: Any) -> Tensor:
    """Return the weight of the one convolution that the replacement computes."""
    return torch.einsum("okab,ki->oiab", new[1].weight.as_subclass(Tensor), new[0].weight[:, :, 0, 0]).detach()


# --- errors --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS.keys())
def test_the_errors_are_those_of_the_outputs(options: Any):
    layer, x = convolution(**options), images()
    moments, seen = seen_by(layer, x)
    offered = Tucker().options(layer, moments, seen)
    assert offered.form == "tucker" and offered.ranks[0] == (1, 1)
    found = [output_error(layer, Tucker().build(layer, moments, rank), x) for rank in offered.ranks]
    torch.testing.assert_close(offered.errors, torch.tensor(found, dtype=torch.float64), **EXACT)
    assert bool((offered.errors.diff() < 0).all())


@pytest.mark.parametrize("calibrated", [True, False])
def test_the_errors_are_those_on_unfolded_inputs(calibrated: bool):
    layer, x = convolution(**ODD, bias=False), images()
    moments, _ = seen_by(layer, x)
    rows = F.unfold(x, layer.kernel_size, layer.dilation, layer.padding, layer.stride).mT.flatten(0, 1)  # (rows, 75)
    rows = rows if calibrated else torch.eye(75, dtype=torch.float64)  # without moments all inputs count alike
    offered = Tucker().options(layer, moments if calibrated else None, None)
    W = layer.weight.detach().flatten(1)
    for rank, error in zip(offered.ranks, offered.errors.tolist(), strict=True):
        rest = weight_of(Tucker().build(layer, moments if calibrated else None, rank)).flatten(1) - W
        assert float((rows @ rest.mT).square().sum() / (rows @ W.mT).square().sum()) == pytest.approx(error, abs=1e-9)


@pytest.mark.parametrize("options", [ODD, OPTIONS["no-bias"]])
def test_moments_make_it_better_than_the_plain_truncation(options: Any):
    layer, x = convolution(**options), images()
    moments, _ = seen_by(layer, x)
    for rank in [(r_out, r_in) for r_out in range(1, 8) for r_in in range(1, 6) if (r_out, r_in) != (7, 5)]:
        plain: Any = Tucker().build(layer, None, rank)
        if layer.bias is not None:  # the best bias for the plain truncation, so that only directions are compared
            plain[1].bias = nn.Parameter(layer.bias + (layer(x) - plain(x)).mean((0, 2, 3)))
        assert output_error(layer, Tucker().build(layer, moments, rank), x) < output_error(layer, plain, x)


def test_without_moments_it_is_near_the_best_for_the_weight():
    layer = convolution()
    W = layer.weight.detach()
    offered = Tucker().options(layer, None, None)
    spectra = [torch.linalg.svdvals(W.movedim(dim, 0).flatten(1)).square() / W.square().sum() for dim in (0, 1)]
    for (r_out, r_in), error in zip(offered.ranks, offered.errors.tolist(), strict=True):
        tails = float(spectra[0][r_out:].sum()), float(spectra[1][r_in:].sum())
        assert max(tails) - 1e-9 <= error <= sum(tails) + 1e-9


def test_the_path_grows_and_stays_smaller_than_the_layer():
    torch.manual_seed(0)
    layer, x = nn.Conv2d(72, 60, 3, padding=1), torch.randn(8, 72, 6, 6).cumsum(-1)
    offered = Tucker().options(layer, *seen_by(layer, x))
    assert 20 <= len(offered.ranks) <= 64
    steps = torch.tensor(offered.ranks).diff(dim=0)
    assert bool((steps >= 0).all()) and bool(((steps > 0).sum(1) == 1).all())
    assert bool((offered.parameters.diff() > 0).all()) and bool((offered.errors.diff() <= 0).all())
    assert offered.parameters[-1] < layer.weight.numel() <= 1.2 * offered.parameters[-1]


def test_the_path_follows_where_the_error_falls():
    layer, of_outputs = nn.Conv2d(16, 16, 3).double(), nn.Conv2d(16, 16, 3, bias=False).double()
    x = torch.randn(9, 16, 8, 8, dtype=torch.float64)
    few = torch.randn(16, 2, dtype=torch.float64) @ torch.randn(2, 16, dtype=torch.float64)
    ranks = Tucker().options(layer, *seen_by(layer, torch.einsum("ij,njhw->nihw", few, x))).ranks
    assert {r_in for r_out, r_in in ranks if r_out < 8} == {1, 2}  # at 8 one convolution would do for two
    of_outputs.weight.data = torch.einsum("op,pihw->oihw", few, of_outputs.weight.data)
    ranks = Tucker().options(of_outputs, *seen_by(of_outputs, x)).ranks
    assert {r_out for r_out, r_in in ranks if r_in < 16} == {1, 2}


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS.keys())
@pytest.mark.parametrize("calibrated", [False, True])
def test_full_ranks_reproduce_the_layer(options: Any, calibrated: bool):
    layer, x = convolution(**options), images()
    moments = seen_by(layer, x[:1])[0] if calibrated else None  # fewer rows than columns: a singular metric
    torch.testing.assert_close(Tucker().build(layer, moments, (7, 5))(x), layer(x), **EXACT)


def test_a_kernel_between_few_channels_is_found_at_its_ranks():
    layer, x = convolution(**ODD), images()
    core, U, V = (torch.randn(shape, dtype=torch.float64) for shape in ((3, 2, 3, 5), (7, 3), (5, 2)))
    layer.weight.data = torch.einsum("klab,ok,il->oiab", core, U, V)
    for moments in (None, seen_by(layer, x)[0]):
        offered = Tucker().options(layer, moments, None)
        errors = dict(zip(offered.ranks, offered.errors.tolist(), strict=True))
        assert all((error < 1e-12) == (r_out >= 3 and r_in >= 2) for (r_out, r_in), error in errors.items())
        torch.testing.assert_close(Tucker().build(layer, moments, (3, 2))(x), layer(x), **EXACT)


def test_the_bias_makes_up_for_the_mean():
    layer, x = convolution(**ODD), images() + 3
    new: Any = Tucker().build(layer, seen_by(layer, x)[0], (3, 2))
    torch.testing.assert_close(new(x).mean((0, 2, 3)), layer(x).mean((0, 2, 3)), **EXACT)
    corrected = output_error(layer, new, x)
    new[1].bias = layer.bias
    assert corrected < output_error(layer, new, x)


def test_a_replacement_is_of_the_same_kind():
    layer, x = convolution().float().eval().to(memory_format=torch.channels_last), images().float()
    layer.weight.requires_grad_(False)
    new = Tucker().build(layer, None, (3, 2))
    first, second = new.children()
    assert type(first) is nn.Conv2d and first.bias is None and type(second) is LowRankConv2d and second.rank == 3
    assert not any(module.training for module in new.modules())
    assert [name for name, p in new.named_parameters() if p.requires_grad] == ["1.bias"]
    assert second.bias is layer.bias and {p.dtype for p in new.parameters()} == {torch.float32}
    assert first.weight.is_contiguous(memory_format=torch.channels_last)
    y = new(x.to(memory_format=torch.channels_last))
    assert y.is_contiguous(memory_format=torch.channels_last)
    torch.testing.assert_close(y, new(x), atol=1e-4, rtol=1e-4)


def test_few_inputs_and_dead_ones_are_no_obstacle():
    layer, x = convolution().float(), images(1).float() + 30
    x[:, 2] = 0
    moments, seen = seen_by(layer, x[..., :7])
    offered = Tucker().options(layer, moments, seen)
    assert bool((offered.errors >= 0).all()) and bool((offered.errors <= 1).all())
    assert all(bool(p.isfinite().all()) for p in Tucker().build(layer, moments, (3, 2)).parameters())
    nothing = Moments(torch.zeros_like(moments.second), torch.zeros_like(moments.mean), moments.rows)
    assert not Tucker().options(layer, nothing, seen).errors.any()


@pytest.mark.parametrize("sizes", [(1, 9, 3), (9, 1, 3), (1, 1, 3), (2, 64, 2), (64, 2, 2)])
def test_narrow_layers(sizes: Any):
    layer = nn.Conv2d(*sizes)
    offered = Tucker().options(layer, None, None)
    assert bool((offered.parameters < layer.weight.numel()).all())
    for rank in offered.ranks:
        assert Tucker().build(layer, None, rank)(torch.ones(1, sizes[0], 4, 4)).shape[1] == sizes[1]


def test_what_it_applies_to():
    form = Tucker()
    assert form.accepts(nn.Conv2d(4, 4, 3)) and form.accepts(nn.Conv2d(4, 4, (1, 3)))
    others = (nn.Conv2d(4, 4, 1), nn.Conv2d(4, 4, 3, groups=2), nn.Conv3d(4, 4, 3), nn.Linear(4, 4))
    assert not any(form.accepts(other) for other in (*others, LowRankConv2d(4, 4, 3, rank=2)))


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS.keys())
@pytest.mark.parametrize("batched", [True, False])
def test_costs_are_those_of_what_is_deployed(options: Any, batched: bool):
    layer, x = convolution(**options), images() if batched else images()[0]
    offered = Tucker().options(layer, None, seen_by(layer, x)[1])
    for i, rank in enumerate(offered.ranks):
        shaped = Tucker().shaped(layer, rank)
        built: Any = Tucker().build(layer, None, rank)
        to_plain_(built)
        assert [p.shape for p in shaped.parameters()] == [p.shape for p in built.parameters()]
        assert sum(p.numel() for p in shaped.parameters() if p.dim() == 4) == offered.parameters[i]
        with FlopCounterMode(display=False) as counter:
            assert shaped(x).dim() == x.dim()
        assert counter.get_total_flops() == 2 * int(offered.multiplications[i])


def network() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 12, 3, padding=1),
        nn.ReLU(),
        nn.Conv2d(12, 16, (3, 5), stride=2),
        nn.BatchNorm2d(16),
        nn.AdaptiveAvgPool2d(2),
        nn.Flatten(),
        nn.Linear(64, 5),
    )


@pytest.mark.parametrize("forms", [["tucker"], None])
@pytest.mark.parametrize("measure", ["parameters", "flops"])
def test_a_network_is_compressed_within_a_budget_and_made_plain(forms: Any, measure: str):
    model, calibration = network(), [torch.randn(16, 3, 11, 12).cumsum(-1) for _ in range(2)]
    before = deployed_parameters(model)
    report = compress_(model, 0.6, measure=measure, calibration=calibration, forms=forms)
    assert report.cost_after <= 0.6 * report.cost_before
    assert deployed_parameters(model) == report.parameters_after < before
    expected = model.eval()(calibration[0])
    to_plain_(model)
    assert not low_rank_layers(model)
    torch.testing.assert_close(model(calibration[0]), expected, atol=1e-4, rtol=1e-4)


def test_all_forms_together_do_no_worse_than_one():
    calibration = [torch.randn(16, 3, 11, 12).cumsum(-1) for _ in range(2)]
    damages = {}
    for forms in (["matrix"], ["spatial"], ["tucker"], None):
        model = network()
        report = compress_(model, 0.6, calibration=calibration, forms=forms, measured_sensitivity=False)
        assert report.parameters_after <= 0.6 * report.parameters_before
        damages[str(forms)] = sum(layer.error for layer in report.layers)
    assert damages["None"] <= 1.05 * min(damages.values())
