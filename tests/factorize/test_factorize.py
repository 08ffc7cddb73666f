"""``factorize_``: which layers are replaced, by what, and what is said about the others."""

import copy
import json
from typing import Any

import pytest
import torch
from torch import nn

from dynarank.factorize import deployed_parameters, factorize_
from dynarank.layers.base import AbstractLowRankLayer, low_rank_layers
from dynarank.layers.conv1d import LowRankConv1d
from dynarank.layers.conv2d import LowRankConv2d
from dynarank.layers.conv3d import LowRankConv3d
from dynarank.layers.linear import LowRankLinear

LAYERS = ["conv", "blocks.0.fc1", "blocks.0.fc2", "blocks.1.fc1", "blocks.1.fc2", "named.last.fc1", "named.last.fc2"]


def ranks(model: nn.Module) -> dict[str, int]:
    return {name: layer.rank for name, layer in low_rank_layers(model).items()}


# --- what is replaced ------------------------------------------------------------------------------------------------


def test_every_layer_but_the_head_is_replaced_by_its_twin():
    model = nn.Sequential(
        nn.Conv1d(8, 16, 3), nn.Conv2d(8, 16, 3), nn.Conv3d(8, 16, 3), nn.Linear(9, 8), nn.Linear(8, 9)
    )
    report = factorize_(model)
    assert [type(m) for m in model] == [LowRankConv1d, LowRankConv2d, LowRankConv3d, LowRankLinear, nn.Linear]
    assert [entry.kind for entry in report.entries] == ["conv1d", "conv2d", "conv3d", "linear", "linear"]


def test_layers_are_found_in_any_nesting(net: Any):
    model = net
    factorize_(model, rank=3)
    assert ranks(model) == dict.fromkeys(LAYERS, 3)
    assert isinstance(model.named["last"].fc2, LowRankLinear) and type(model.head) is nn.Linear
    model(torch.randn(2, 3, 8, 8)).sum().backward()
    assert all(p.grad is not None for p in model.parameters())


def test_factors_are_the_truncated_svd_and_biases_stay_the_same_parameters(net: Any):
    model = net.double()
    dense = copy.deepcopy(model)
    biases = {name: p for name, p in model.named_parameters() if name.endswith("bias")}
    factorize_(model, rank=3)
    for name, layer in low_rank_layers(model).items():
        W = dense.get_submodule(name).weight.detach().flatten(1)
        U, sigma, Vh = torch.linalg.svd(W, full_matrices=False)
        expected = (U[:, :3] @ torch.diag(sigma[:3]) @ Vh[:3]).reshape(layer.weight_shape)
        torch.testing.assert_close(layer.to_dense().weight.detach(), expected, atol=1e-12, rtol=0)
    assert {name: id(p) for name, p in model.named_parameters() if name in biases} == {
        n: id(p) for n, p in biases.items()
    }


def test_full_rank_computes_the_same(net: Any):
    model = net.double().eval()
    x = torch.randn(2, 3, 8, 8, dtype=torch.float64)
    y = model(x)
    report = factorize_(model, rank="full", include_head=True)
    assert not report.kept_dense and ranks(model)["blocks.0.fc1"] == 16
    torch.testing.assert_close(model(x), y, atol=1e-12, rtol=1e-12)
    assert "larger than dense in training until its rank is cut" in report.factorized[0].note
    assert report.after == report.before


def test_nothing_is_random_and_the_order_of_modules_does_not_matter():
    first, second = nn.Linear(20, 16), nn.Linear(16, 20)
    one = nn.ModuleDict({"a": copy.deepcopy(first), "b": copy.deepcopy(second)})
    other = nn.ModuleDict({"b": copy.deepcopy(second), "a": copy.deepcopy(first)})
    state = torch.get_rng_state()
    factorize_(one, include_head=True)
    assert torch.equal(torch.get_rng_state(), state)
    factorize_(other, include_head=True)
    for name in ("a", "b"):
        assert torch.equal(one[name].A, other[name].A) and torch.equal(one[name].B, other[name].B)


@pytest.mark.parametrize("training", [True, False])
def test_mode_dtype_and_trainability_are_kept(training: bool):
    model = nn.Sequential(nn.Linear(20, 16), nn.ReLU(), nn.Linear(16, 4)).to(torch.bfloat16).train(training)
    model[0].weight.requires_grad_(False)
    factorize_(model)
    assert model[0].training is training and model[0].A.dtype == torch.bfloat16
    assert not model[0].A.requires_grad and model[0].bias.requires_grad


def test_a_model_on_the_meta_device_gets_ranks_and_no_memory(net: Any):
    model = net.to("meta")
    report = factorize_(model, rank_pattern={"conv": 2})
    assert all(p.is_meta for p in model.parameters())
    assert ranks(model)["conv"] == 2 and ranks(model)["blocks.0.fc1"] == 4
    assert report.after == deployed_parameters(model) < report.before


def test_models_keep_working_with_torch(net: Any):
    model = net.eval()
    factorize_(model)
    x = torch.randn(2, 3, 8, 8)
    y = model(x)
    assert torch.equal(copy.deepcopy(model)(x), y)
    assert torch.equal(torch.func.functional_call(model, dict(model.named_parameters()), (x,)), y)
    for dtype in (torch.bfloat16, torch.float16, torch.float64):
        other = copy.deepcopy(model).to(dtype)
        torch.testing.assert_close(other(x.to(dtype)).float(), y, atol=0.05, rtol=0.05)
    assert torch.equal(torch.compile(model, backend="eager")(x), y)


# --- nothing to do ---------------------------------------------------------------------------------------------------


def test_a_model_without_layers_is_an_error():
    message = r"replaced no layer: the model has none with a low-rank twin. .* found EmbeddingBag, LSTM"
    with pytest.raises(ValueError, match=message):
        factorize_(nn.ModuleList([nn.LSTM(4, 4), nn.EmbeddingBag(4, 4)]))


def test_a_model_of_which_every_layer_stays_dense_is_an_error():
    message = (
        r"of 2 with a low-rank twin every one stays dense: 0 \(rank 9 is above .*\), 1 \(classifier head, the last"
    )
    with pytest.raises(ValueError, match=message):
        factorize_(nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 3)), rank=9)


def test_the_model_itself_cannot_be_replaced():
    with pytest.raises(ValueError, match=r"the model \(it is the model itself, .* wrap it in nn.Sequential\)"):
        factorize_(nn.Linear(20, 20))


def test_a_second_call_leaves_low_rank_layers_as_they_are(net: Any):
    model = net
    factorize_(model, rank=2, target_modules="conv")
    conv = model.conv
    report = factorize_(model, rank=3)
    assert model.conv is conv and ranks(model) == {"conv": 2} | dict.fromkeys(LAYERS[1:], 3)
    assert report.entries[0].status == "low-rank before" and report.entries[0].rank == 2
    again = factorize_(model)
    assert not again.factorized and again.before == again.after == report.after


# --- failures --------------------------------------------------------------------------------------------------------


def test_a_failure_leaves_the_model_as_it_was(net: Any):
    model = net
    with torch.no_grad():
        model.named["last"].fc2.weight[0, 0] = torch.nan
    before = list(model.modules())
    with pytest.raises(ValueError, match=r"left the model as it was: named.last.fc2: svd needs finite entries"):
        factorize_(model)
    assert all(a is b for a, b in zip(model.modules(), before, strict=True))
    assert not any(isinstance(module, AbstractLowRankLayer) for module in model.modules())


# --- the report ------------------------------------------------------------------------------------------------------


def test_the_report_counts_what_is_deployed(net: Any):
    model = net
    numbers = sum(p.numel() for p in model.parameters()) + sum(b.numel() for b in model.buffers())
    report = factorize_(model, rank=2)
    assert report.before == numbers
    assert report.after == sum(t.numel() for t in model.state_dict().values()) == deployed_parameters(model)
    saved = sum(entry.before - entry.after for entry in report.factorized)
    assert report.before - report.after == saved
    assert {entry.name for entry in report.entries} == {*LAYERS, "head"}


def test_the_report_prints_an_aligned_table(net: Any):
    report = factorize_(net, rank=2, exclude_modules=["last.fc2"])
    lines = str(report).splitlines()
    assert lines[0].split() == ["layer", "kind", "shape", "rank", "before", "after"]
    assert lines[1] == "conv            conv2d  16 x 27     2     432     86"
    assert lines[7] == "named.last.fc2  linear  16 x 32     -     512    512  dense: named in exclude_modules"
    share = f"{100 * report.after / report.before:.1f} %"
    total = f"the model goes from {report.before:,} to {report.after:,} numbers ({share}) as deployed."
    assert lines[9] == f"6 of 8 weights factorised; {total}"
    assert len({line.index(" x ") for line in lines[1:9]}) == 1


def test_the_report_is_plain_data(net: Any):
    report = factorize_(net, rank=2)
    data = json.loads(json.dumps(report.as_dict()))
    assert data["entries"][0]["name"] == "conv" and data["entries"][0]["rank"] == 2
    assert data["entries"][-1]["reason"].startswith("classifier head")
    assert data["before"] == report.before
