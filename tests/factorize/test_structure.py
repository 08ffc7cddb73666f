"""The structure of a model says all but the weights: a dense model brought into it loads them and computes the same."""

import copy
import json
from typing import Any

import pytest
import torch
from torch import nn

from dynarank._discovery import discover
from dynarank.factorize import factorize_, merge_
from dynarank.factorize.structure import restructure_, structure
from dynarank.layers._factored import AbstractFactoredLayer
from dynarank.layers.base import AbstractLowRankLayer, low_rank_layers
from dynarank.layers.conv2d import LowRankConv2d
from dynarank.layers.linear import LowRankLinear

TWINS: Any = discover("dynarank.layers", AbstractFactoredLayer)
KINDS = {kind: twin for kind, twin in TWINS.items() if issubclass(twin, AbstractLowRankLayer)}
DENSE = {
    "linear": (lambda: nn.Linear(7, 5), (3, 7)),
    "conv1d": (lambda: nn.Conv1d(3, 5, 3, stride=2, bias=False), (2, 3, 9)),
    "conv2d": (lambda: nn.Conv2d(3, 5, (3, 2), padding="same", padding_mode="reflect"), (2, 3, 6, 5)),
    "conv3d": (lambda: nn.Conv3d(2, 5, 2, dilation=(1, 2, 1)), (2, 2, 4, 5, 4)),
    "conv2d_spatial": (lambda: nn.Conv2d(3, 5, 3, padding=(1, 0)), (2, 3, 6, 5)),
    "embedding": (lambda: nn.Embedding(7, 5, 2), (3, 4)),
}


def in_json(model: nn.Module) -> dict[str, Any]:
    """The structure of a model after a way through a file."""
    return json.loads(json.dumps(structure(model)))


def tucker(dense: nn.Conv2d, *, inner: int, rank: int) -> nn.Sequential:
    """A 1x1 convolution and a low-rank one, which stand for a dense one."""
    first = nn.Conv2d(dense.in_channels, inner, 1, bias=False)
    options: Any = LowRankConv2d.dense_options(dense) | {"in_channels": inner}
    return nn.Sequential(first, LowRankConv2d(**options, bias=dense.bias is not None, rank=rank))


@pytest.mark.parametrize("kind", sorted(KINDS))
@pytest.mark.parametrize("form", ["pair", "core"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_every_kind_of_layer_comes_back(kind: str, form: Any, dtype: torch.dtype):
    build, shape = DENSE[kind]
    low_rank = KINDS[kind].from_dense(build(), rank=2, rank_multiple=3)
    low_rank.set_factors(low_rank.factors(), form=form)
    saved = nn.Sequential(low_rank).to(dtype)
    model = nn.Sequential(build())
    restructure_(model, in_json(saved))
    assert structure(model) == structure(saved)
    assert not any(t.any() for name, t in model[0].state_dict().items() if name != "bias")
    model.load_state_dict(saved.state_dict())
    x = torch.randint(7, shape) if kind == "embedding" else torch.randn(shape, dtype=dtype)
    assert torch.equal(model(x), saved(x))


def test_a_network_comes_back_with_its_ranks(net: Any, new_net: Any):
    factorize_(net, rank_multiple=4, rank_pattern={"conv": 3, "blocks.0.fc1": 1, "blocks.1.fc1": 5})
    model = new_net()
    restructure_(model, in_json(net))
    model.load_state_dict(net.state_dict())
    assert repr(model) == repr(net)
    x = torch.randn(2, 3, 8, 8)
    assert torch.equal(model(x), net(x))


def test_spare_rows_and_rectangular_cores_are_part_of_it():
    spare = LowRankLinear(9, 8, rank=5)
    spare.set_factors(LowRankLinear(9, 8, rank=2).point(), resize=False)
    core = LowRankLinear(9, 8, rank=3)
    grown = core.factors()
    basis = torch.linalg.qr(torch.randn(8, 5)).Q
    core.set_factors(type(grown)(basis, torch.randn(5, 3), grown.V))
    saved = nn.Sequential(spare, core)
    assert [entry["stored"] for entry in structure(saved).values()] == [[5, 5], [5, 3]]
    model = nn.Sequential(nn.Linear(9, 8), nn.Linear(9, 8))
    restructure_(model, in_json(saved))
    assert [tuple(p.shape) for p in model.parameters()] == [tuple(p.shape) for p in saved.parameters()]
    assert structure(model) == structure(saved)


def test_a_model_that_has_the_structure_keeps_its_layers(net: Any):
    factorize_(net, rank=2)
    saved, layers = in_json(net), low_rank_layers(net)
    restructure_(net, saved)
    assert low_rank_layers(net) == layers
    other = copy.deepcopy(net)
    other.conv.set_factors(other.conv.factors(), form="core")
    restructure_(net, in_json(other))
    assert {name for name, layer in low_rank_layers(net).items() if layer is not layers[name]} == {"conv"}
    assert net.conv.form == "core"


def test_what_users_hold_and_set_stays(net: Any, new_net: Any):
    factorize_(net, rank=2)
    model = new_net().eval()
    bias, calls = model.conv.bias, []
    model.conv.note = "mine"
    model.conv.requires_grad_(False)
    handle = model.conv.register_forward_hook(lambda *_: calls.append(1))
    state = torch.get_rng_state()
    restructure_(model, in_json(net))
    assert torch.equal(torch.get_rng_state(), state)
    model(torch.ones(1, 3, 8, 8))
    handle.remove()
    assert model.conv.bias is bias and model.conv.note == "mine" and calls == [1]
    assert not model.conv.training and not model.conv.A.requires_grad and model.blocks[0].fc1.A.requires_grad


def test_a_model_on_the_meta_device_stays_there(net: Any):
    model = copy.deepcopy(net).to("meta")
    factorize_(net, rank=2)
    restructure_(model, in_json(net))
    assert all(p.is_meta for p in model.parameters())
    assert {k: t.shape for k, t in model.state_dict().items()} == {k: t.shape for k, t in net.state_dict().items()}


def test_a_chain_takes_the_place_of_one_convolution(net: Any, new_net: Any):
    net.conv = tucker(net.conv, inner=2, rank=3)
    factorize_(net, target_modules=["fc1"], rank=2)
    saved = in_json(net)
    assert saved["conv"]["kind"] == "chain" and saved["conv"]["layers"]["0"]["form"] == "dense"
    model = new_net()
    restructure_(model, saved)
    model.load_state_dict(net.state_dict())
    x = torch.randn(2, 3, 8, 8)
    assert repr(model) == repr(net) and torch.equal(model(x), net(x))
    layers = low_rank_layers(model)
    restructure_(model, saved)  # it has the structure now
    assert low_rank_layers(model) == layers


def test_a_sequence_that_belongs_to_the_architecture_stays():
    def build() -> nn.Module:
        return nn.Sequential(nn.Sequential(nn.Conv2d(3, 4, 1, bias=False), nn.Conv2d(4, 5, 3)), nn.ReLU())

    saved = build()
    factorize_(saved, target_modules=["0.1"], rank=2)
    model = build()
    first = model[0][0]
    restructure_(model, in_json(saved))
    assert model[0][0] is first and repr(model) == repr(saved)


def test_a_layer_that_is_used_twice_stays_one():
    def build() -> nn.Module:
        layer = nn.Linear(6, 6)
        return nn.Sequential(layer, nn.ReLU(), layer)

    saved = build()
    factorize_(saved, rank=2, include_head=True)
    assert structure(saved)["0"]["names"] == ["0", "2"]
    model = build()
    restructure_(model, in_json(saved))
    assert model[0] is model[2] and isinstance(model[0], LowRankLinear)


def test_transformer_layers_leave_their_fast_path():
    def build() -> nn.Module:
        return nn.TransformerEncoder(nn.TransformerEncoderLayer(8, 2, 12, batch_first=True), 2).eval()

    saved, model = build(), build()
    factorize_(saved, rank=2)
    restructure_(model, in_json(saved))
    model.load_state_dict(saved.state_dict())
    x = torch.randn(2, 5, 8)
    with torch.no_grad():
        assert torch.equal(model(x), saved(x))
    merge_(model)
    assert model.layers[0].activation_relu_or_gelu == 1
