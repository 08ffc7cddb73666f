"""``merge_`` and ``to_plain_`` give back a model of plain torch layers that computes the same."""

import copy
import json
from typing import Any

import pytest
import torch
from torch import nn

from dynarank.factorize import deployed_parameters, factorize_, merge_, to_plain_
from dynarank.layers.base import AbstractLowRankLayer, low_rank_layers
from dynarank.layers.linear import LowRankLinear

EXACT = {"atol": 1e-12, "rtol": 1e-12}


def is_plain(model: nn.Module) -> bool:
    return not any(type(module).__module__.startswith("dynarank") for module in model.modules())


@pytest.fixture(params=["pair", "core"])
def low_rank(net: Any, request: pytest.FixtureRequest) -> Any:
    """The network in float64 with ranks from one to beyond break-even, in either form."""
    model = net.double().eval()
    pattern = {"conv": 3, "blocks.0.fc1": 1, "blocks.1.fc1": "full"}
    factorize_(model, rank=2, rank_multiple=4, rank_pattern=pattern)
    for layer in low_rank_layers(model).values():
        layer.set_factors(layer.factors(), form=request.param)
    return model


@pytest.mark.parametrize("convert", [merge_, to_plain_])
def test_outputs_stay_the_same(low_rank: Any, convert: Any):
    x = torch.randn(2, 3, 8, 8, dtype=torch.float64)
    y, bias = low_rank(x), low_rank.conv.bias
    report = convert(low_rank)
    torch.testing.assert_close(low_rank(x), y, **EXACT)
    assert not any(isinstance(module, AbstractLowRankLayer) for module in low_rank.modules())
    assert len(report) == 7 and report.largest_error < 1e-15
    assert any(bias is p for p in low_rank.conv.parameters())
    assert not any(module.training for module in low_rank.modules())
    low_rank(x).sum().backward()
    assert all(p.grad is not None for p in low_rank.parameters())


def test_merging_restores_the_dense_model(new_net: Any):
    dense = new_net().double()
    model = copy.deepcopy(dense)
    factorize_(model, rank="full", include_head=True)
    merge_(model)
    assert repr(model) == repr(dense)
    torch.testing.assert_close(dict(model.state_dict()), dict(dense.state_dict()), **EXACT)


def test_plain_layers_are_two_unless_one_is_smaller(low_rank: Any):
    deployed = deployed_parameters(low_rank)
    report = to_plain_(low_rank)
    assert {e.name: e.form for e in report.entries if e.form == "dense"} == {"blocks.1.fc1": "dense"}
    assert report.entries[3].note == "plain layers would not be smaller"
    assert [type(m) for m in low_rank.conv] == [nn.Conv2d, nn.Conv2d]
    assert low_rank.conv[0].weight.shape == (3, 3, 3, 3) and low_rank.conv[0].bias is None
    assert sum(t.numel() for t in low_rank.state_dict().values()) == deployed


def test_only_the_chosen_layers_are_replaced(low_rank: Any):
    report = merge_(low_rank, modules=["fc2"])
    assert [e.name for e in report.entries] == ["blocks.0.fc2", "blocks.1.fc2", "named.last.fc2"]
    assert set(low_rank_layers(low_rank)) == {"conv", "blocks.0.fc1", "blocks.1.fc1", "named.last.fc1"}
    assert len(to_plain_(low_rank, modules="conv")) == 1
    assert len(merge_(low_rank)) == 3
    with pytest.raises(ValueError, match="merge_ found no low-rank layer in the model"):
        merge_(low_rank)


@pytest.mark.parametrize("convert", [merge_, to_plain_])
def test_what_cannot_be_done_is_refused(net: Any, convert: Any):
    with pytest.raises(ValueError, match=f"{convert.__name__} found no low-rank layer in the model"):
        convert(net)
    factorize_(net)
    with pytest.raises(ValueError, match=r"modules: 'fc3' matches no layer. Did you mean"):
        convert(net, modules=["fc3"])
    with pytest.raises(ValueError, match=f"{convert.__name__} cannot replace the model itself in place. Use layer.to_"):
        convert(net.conv)
    assert len(low_rank_layers(net)) == 7


def test_half_precision_is_merged_in_float32_and_the_error_reported():
    model = nn.Sequential(nn.Linear(64, 48), nn.ReLU(), nn.Linear(48, 4))
    factorize_(model, rank=8)
    layer = model.bfloat16()[0]
    exact = layer.A.detach().float().mT @ layer.B.detach().float()
    report = merge_(model)
    assert torch.equal(model[0].weight, exact.bfloat16())
    error = torch.linalg.norm(model[0].weight.detach().float() - exact) / torch.linalg.norm(exact)
    assert report.entries[0].error == pytest.approx(float(error), rel=1e-3)
    assert 1e-4 < report.largest_error < 2**-8
    assert json.loads(json.dumps(report.as_dict()))["entries"][0]["form"] == "dense"


def test_a_core_in_half_precision_reports_what_its_cast_costs():
    model = nn.Sequential(LowRankLinear(64, 48, rank=8))
    model[0].set_factors(model[0].factors(), form="core")
    model.bfloat16()
    report = to_plain_(model)
    assert 1e-4 < report.largest_error < 2**-7


@pytest.mark.parametrize("convert", [merge_, to_plain_])
@pytest.mark.parametrize("form", ["pair", "core"])
def test_the_error_is_that_of_the_directions_that_are_active(convert: Any, form: Any):
    model: Any = nn.Sequential(LowRankLinear(24, 18, rank=6), nn.ReLU(), LowRankLinear(18, 12, rank=4)).double()
    for layer in low_rank_layers(model).values():
        layer.set_factors(layer.factors(), form=form)
    whole, x = model[0].weight.detach().clone(), torch.randn(3, 24, dtype=torch.float64)
    model[0].active_rank = 2
    y, weight = model(x), model[0].to_dense().weight.detach()
    assert float(torch.linalg.norm(weight - whole) / torch.linalg.norm(whole)) > 0.1
    report = convert(model)
    torch.testing.assert_close(model(x), y, **EXACT)
    assert report.largest_error < 1e-15


def test_the_report_prints_a_table(low_rank: Any):
    lines = str(merge_(low_rank)).splitlines()
    assert lines[0].split() == ["layer", "shape", "rank", "now", "error"]
    assert lines[1].split()[:6] == ["conv", "16", "x", "27", "3", "dense"]
    assert lines[-1].startswith("7 low-rank layers replaced; largest relative error ")


def test_a_model_on_the_meta_device_can_be_merged():
    model = nn.Sequential(nn.Linear(64, 48), nn.Linear(48, 4)).to("meta")
    factorize_(model)
    other = copy.deepcopy(model)
    assert merge_(model).largest_error == 0.0 and model[0].weight.is_meta
    assert to_plain_(other).entries[0].form == "plain" and other[0][0].weight.is_meta


def test_plain_models_can_be_exported_and_quantised():
    model = nn.Sequential(nn.Conv2d(3, 16, 3), nn.ReLU(), nn.Flatten(), nn.Linear(16 * 36, 40), nn.Linear(40, 10))
    factorize_(model)
    to_plain_(model)
    assert is_plain(model)
    x = torch.randn(2, 3, 8, 8)
    exported = torch.export.export(model.eval(), (x,)).module()
    torch.testing.assert_close(exported(x), model(x))
    loaded = copy.deepcopy(model)
    loaded.load_state_dict(model.state_dict())
