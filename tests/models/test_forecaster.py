"""Laws of Forecaster: the plain formula on patches, each series by itself, narrower ones never exceed the size."""

import math
from itertools import pairwise

import pytest
import torch
from torch import nn

import dynarank
from dynarank.factorize import deployed_parameters
from dynarank.models.forecaster import Block, Forecaster, forecaster_parameters

SMALL = {"lookback": 12, "horizon": 8, "patch": 4, "layers": 2, "heads": 2, "width": 6}


def small(**options) -> Forecaster:
    """A small network in float64 whose branches are not small."""
    model = Forecaster(**SMALL, **options).double()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(10)
        for norm in (m for m in model.modules() if isinstance(m, nn.LayerNorm)):
            nn.init.ones_(norm.weight)
    return model


def test_the_count_is_the_formula_by_hand():
    block = 4 * (128 * 128 + 128) + (128 * 512 + 512) + (512 * 128 + 128) + 2 * 2 * 128
    patches, positions, norm, head = 24 * 128 + 128, 18 * 128, 2 * 128, 128 * 24 + 24
    assert deployed_parameters(Forecaster()) == patches + positions + 3 * block + norm + head == 603_672


@pytest.mark.parametrize(("heads", "width", "mlp_ratio"), [(1, 1, 4), (3, 6, 1.5), (2, 10, 0.3)])
def test_the_formula_counts_every_parameter(heads: int, width: int, mlp_ratio: float):
    model = Forecaster(lookback=15, horizon=6, patch=3, layers=3, heads=heads, width=width, mlp_ratio=mlp_ratio)
    count = forecaster_parameters(tokens=7, patch=3, layers=3, width=width, hidden=model.hidden)
    assert count == deployed_parameters(model)
    assert model(torch.randn(5, 2, 15)).shape == (5, 2, 6)


def test_every_matrix_has_a_readable_name():
    layers = [name for name, m in Forecaster(**SMALL).named_modules() if isinstance(m, nn.Linear)]
    kinds = ("query", "key", "value", "out", "up", "down")
    assert layers == ["patches", *(f"blocks.{block}.{kind}" for block in range(2) for kind in kinds), "head"]


def normalised(x: torch.Tensor) -> torch.Tensor:
    return (x - x.mean(-1, keepdim=True)) / torch.sqrt(x.var(-1, keepdim=True, correction=0) + 1e-5)


def by_hand(block: Block, features: torch.Tensor) -> torch.Tensor:
    x = normalised(features)
    heads = []
    for columns in (slice(0, 3), slice(3, 6)):
        query, key, value = (layer(x)[..., columns] for layer in (block.query, block.key, block.value))
        heads.append((query @ key.mT / math.sqrt(3)).softmax(-1) @ value)
    features = features + block.out(torch.cat(heads, -1))
    hidden = block.up(normalised(features))
    return features + block.down(hidden * (1 + torch.erf(hidden / math.sqrt(2))) / 2)


def test_it_is_the_plain_formula():
    model = small()
    series = torch.randn(3, 12, dtype=torch.float64) + 2
    forecasts = model(series.unsqueeze(0))[0]
    for known, forecast in zip(series, forecasts, strict=True):
        standard = normalised(known)
        patches = torch.stack([standard[0:4], standard[4:8], standard[8:12]])
        tokens = torch.cat([patches @ model.patches.weight.mT + model.patches.bias, torch.zeros(2, 6).double()])
        features = tokens + model.positions.weight
        for block in model.blocks:
            features = by_hand(block, features)  # type: ignore[arg-type]
        hours = (normalised(features)[3:] @ model.head.weight.mT + model.head.bias).flatten()
        expected = hours * torch.sqrt(known.var(correction=0) + 1e-5) + known.mean()
        torch.testing.assert_close(forecast, expected)


def test_series_are_forecast_by_themselves_and_every_hour_counts():
    model = small()
    series = torch.randn(2, 3, 12, dtype=torch.float64, requires_grad=True)
    model(series)[1, 2].square().sum().backward()
    assert series.grad is not None
    assert series.grad[1, 2].all()
    assert not series.grad[0].any() and not series.grad[1, :2].any()


def test_the_order_of_patches_matters():
    model = small()
    series = torch.randn(1, 1, 12, dtype=torch.float64)
    swapped = series.roll(4, -1)
    assert (model(series) - model(swapped)).abs().max() > 1e-3


def test_the_unit_of_a_series_does_not_matter():
    model = small()
    series = torch.randn(1, 1, 12, dtype=torch.float64)
    torch.testing.assert_close(model(1e3 * series - 70), 1e3 * model(series) - 70, rtol=1e-4, atol=1e-3)


def test_a_constant_series_stays_near_its_value():
    forecast = small()(torch.full((1, 1, 12), 3.0, dtype=torch.float64))
    assert (forecast - 3).abs().max() < 0.1


def test_dropout_acts_in_training_alone():
    model = small(dropout=0.5)
    series = torch.randn(1, 2, 12, dtype=torch.float64)
    assert not torch.equal(model(series), model(series))
    model.eval()
    assert torch.equal(model(series), model(series))
    assert model.narrower(400).blocks[1].dropout == 0.5


def test_the_branches_start_smaller_the_deeper_the_network():
    model = Forecaster(layers=8, width=64)
    for name, parameter in model.named_parameters():
        if parameter.dim() == 2:
            deviation = 0.02 / 4 if name.endswith(("out.weight", "down.weight")) else 0.02
            torch.testing.assert_close(parameter.std().item(), deviation, atol=0, rtol=0.1)
        elif name.endswith("bias"):
            assert not parameter.any()


@pytest.mark.parametrize("share", [0.02, 0.05, 0.1, 0.2, 0.33, 0.5, 0.8, 0.95])
def test_narrower_never_exceeds_and_comes_close(share: float):
    model = Forecaster()
    parameters = int(share * deployed_parameters(model))
    narrower = model.narrower(parameters)
    assert 0.98 * parameters < deployed_parameters(narrower) <= parameters
    assert (narrower.layers, narrower.heads, narrower.lookback, narrower.horizon, narrower.patch) == (3, 4, 336, 96, 24)
    assert narrower.width <= 128 and 4 * narrower.width <= narrower.hidden <= 512
    again = model.narrower(parameters)
    assert (again.width, again.hidden) == (narrower.width, narrower.hidden)


def test_narrower_grows_with_the_size_asked_for():
    model = Forecaster(lookback=8, horizon=2, patch=2, layers=2, heads=3, width=24, mlp_ratio=2.5)
    counts = [deployed_parameters(model.narrower(parameters)) for parameters in range(500, 9_000, 100)]
    assert all(before <= after for before, after in pairwise(counts))


@pytest.mark.parametrize("mlp_ratio", [4, 1.7, 0.1])
def test_narrower_is_the_model_itself_at_its_own_count_and_beyond(mlp_ratio: float):
    model = Forecaster(**SMALL, mlp_ratio=mlp_ratio)
    for parameters in (deployed_parameters(model), 10**9):
        narrower = model.narrower(parameters)
        assert (narrower.width, narrower.hidden, narrower.lookback, narrower.horizon) == (6, model.hidden, 12, 8)


def test_narrower_names_the_smallest_size():
    smallest = deployed_parameters(Forecaster(width=4))
    assert Forecaster().narrower(smallest).width == 4
    with pytest.raises(ValueError, match=f"parameters must be at least {smallest}, got {smallest - 1}"):
        Forecaster().narrower(smallest - 1)


def test_every_matrix_but_the_head_can_be_factorised():
    model = Forecaster(**SMALL)
    report = dynarank.factorize_(model, rank=1)
    assert {entry.name for entry in report.entries if entry.rank is None} == {"positions", "head"}
    assert model(torch.zeros(2, 3, 12)).shape == (2, 3, 8)


def test_it_exports_as_one_graph():
    model = Forecaster(**SMALL).eval()
    series = torch.randn(2, 3, 12)
    torch.testing.assert_close(torch.export.export(model, (series,)).module()(series), model(series))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"width": 130}, "width must be a multiple of heads = 4, got 130"),
        ({"lookback": 100}, "lookback must be a multiple of patch = 24, got 100"),
        ({"horizon": 100}, "horizon must be a multiple of patch = 24, got 100"),
        ({"dropout": 1.0}, "dropout must be at least 0 and below 1, got 1.0"),
    ],
)
def test_options_that_do_not_fit_are_refused(options: dict, message: str):
    with pytest.raises(ValueError, match=message):
        Forecaster(**options)


@pytest.mark.parametrize("name", ["lookback", "horizon", "patch", "layers", "heads", "width", "mlp_ratio"])
def test_empty_sizes_are_refused(name: str):
    with pytest.raises(ValueError, match=f"{name}.* must be at least 1, got 0"):
        Forecaster(**{name: 0})
