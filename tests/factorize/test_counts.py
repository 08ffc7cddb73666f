"""Sizes are counted as deployed, and a dense state dict goes in and out of a factorised model."""

import copy
from typing import Any

import pytest
import torch
from torch import nn

from dynarank.factorize import dense_state_dict, deployed_parameters, factorize_, trainable_parameters
from dynarank.layers.base import low_rank_layers
from dynarank.layers.linear import LowRankLinear

EXACT = {"atol": 1e-12, "rtol": 1e-12}


@pytest.mark.parametrize(("rank", "weight"), [(1, 90), (3, 270), (22, 1980), (23, 2000), (40, 2000)])
@pytest.mark.parametrize("multiple", [1, 16])
@pytest.mark.parametrize("form", ["pair", "core"])
def test_a_layer_counts_its_factors_or_its_dense_weight(rank: int, weight: int, multiple: int, form: Any):
    layer = LowRankLinear(50, 40, rank=rank, rank_multiple=multiple)
    layer.set_factors(layer.factors(), form=form)
    assert deployed_parameters(layer) == weight + 40
    expected = rank * rank if form == "core" else layer.capacity * 90
    assert trainable_parameters(layer) == expected + 40


def test_shared_tensors_count_once_and_only_what_is_saved_counts():
    model = nn.ModuleDict({"tokens": nn.Embedding(10, 4), "head": nn.Linear(4, 10), "norm": nn.BatchNorm1d(4)})
    model["head"].weight = model["tokens"].weight
    model["again"] = model["norm"]
    model.register_buffer("scratch", torch.zeros(100), persistent=False)
    assert deployed_parameters(model) == 40 + 10 + (4 + 4 + 4 + 4 + 1)
    assert trainable_parameters(model) == 40 + 10 + 8
    model["tokens"].requires_grad_(False)
    assert trainable_parameters(model) == 10 + 8


def test_shared_low_rank_layers_count_once():
    layer = LowRankLinear(50, 40, rank=2)
    assert deployed_parameters(nn.Sequential(layer, nn.Sequential(layer))) == 2 * 90 + 40


# --- dense state dicts ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("form", ["pair", "core"])
def test_a_dense_state_dict_has_the_keys_of_the_dense_model(new_net: Any, form: Any):
    dense = new_net().double()
    model = copy.deepcopy(dense)
    factorize_(model, rank=2, rank_multiple=4)
    for layer in low_rank_layers(model).values():
        layer.set_factors(layer.factors(), form=form)
    state = dense_state_dict(model)
    assert {k: (v.shape, v.dtype) for k, v in state.items()} == {
        k: (v.shape, v.dtype) for k, v in dense.state_dict().items()
    }
    assert list(state) == list(dense.state_dict())
    dense.load_state_dict(state)
    x = torch.randn(2, 3, 8, 8, dtype=torch.float64)
    torch.testing.assert_close(dense.eval()(x), model.eval()(x), **EXACT)


def test_a_dense_state_dict_goes_round(new_net: Any):
    model, other = new_net().double(), new_net().double()
    for net in (model, other):
        factorize_(net, rank=2)
    other.load_state_dict(dense_state_dict(model))
    torch.testing.assert_close(dense_state_dict(other), dense_state_dict(model), **EXACT)


def test_a_pretrained_dense_state_dict_loads_into_a_factorised_model(new_net: Any):
    trained, model = new_net().double(), new_net().double()
    expected = copy.deepcopy(trained)
    for net in (expected, model):
        factorize_(net, rank=2)
    model.load_state_dict(trained.state_dict())
    for name, tensor in expected.state_dict().items():
        assert torch.equal(model.state_dict()[name], tensor)


def test_shared_layers_appear_under_every_name():
    layer = LowRankLinear(6, 6, rank=2)
    model = nn.ModuleDict({"x": layer, "y": nn.Sequential(layer)})
    state = dense_state_dict(model)
    assert list(state) == ["x.weight", "x.bias", "y.0.weight", "y.0.bias"]
    assert state["x.weight"] is state["y.0.weight"]


def test_the_layer_itself_has_a_dense_state_dict():
    layer = LowRankLinear(6, 5, rank=2)
    dense = nn.Linear(6, 5)
    dense.load_state_dict(dense_state_dict(layer))
    torch.testing.assert_close(dense.weight, layer.to_dense().weight)


def test_a_dense_state_dict_can_be_saved(tmp_path: Any):
    model = nn.Sequential(LowRankLinear(6, 5, rank=2), nn.BatchNorm1d(5))
    torch.save(dense_state_dict(model), tmp_path / "dense.pt")
    loaded = torch.load(tmp_path / "dense.pt", weights_only=True)
    assert not any(tensor.requires_grad for tensor in loaded.values())
    dense = nn.Sequential(nn.Linear(6, 5), nn.BatchNorm1d(5))
    dense.load_state_dict(loaded)
