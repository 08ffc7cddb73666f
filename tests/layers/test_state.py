"""State dicts, copies and files: a layer takes the rank and the form of what it loads."""

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from dynarank.layers.conv2d import LowRankConv2d
from dynarank.layers.linear import LowRankLinear

EXACT = {"atol": 1e-12, "rtol": 1e-12}


def same(layer: Any, other: Any) -> None:
    """Check that two layers are equal in every respect, bit for bit."""
    assert (layer.rank, layer.capacity, layer.form) == (other.rank, other.capacity, other.form)
    state, expected = layer.state_dict(), other.state_dict()
    assert list(state) == list(expected)
    assert all(torch.equal(state[name], expected[name]) for name in state)


@pytest.mark.parametrize("assign", [False, True])
@pytest.mark.parametrize("rank", [1, 2, 4])
def test_round_trip_into_a_layer_of_another_rank(kind: Any, form: str, rank: int, assign: bool):
    layer, other = kind.build(2), kind.build(rank, rank_multiple=2)
    layer.set_factors(layer.factors(), form=form)
    other.load_state_dict(copy.deepcopy(layer.state_dict()), assign=assign)
    same(other, layer)
    x = kind.inputs()
    torch.testing.assert_close(other(x), layer(x), **EXACT)


def test_round_trip_between_forms(kind: Any):
    pair, core = kind.build(2), kind.build(3)
    core.set_factors(core.factors(), form="core")
    kept = copy.deepcopy(pair)
    pair.load_state_dict(core.state_dict())
    same(pair, core)
    pair.load_state_dict(kept.state_dict())
    same(pair, kept)
    assert pair.A.requires_grad and pair.S is None and pair.U is None


def test_loading_keeps_the_identity_of_the_parameters(kind: Any):
    layer = kind.build(2)
    held = list(layer.parameters())
    layer.load_state_dict(kind.build(4).state_dict())
    assert all(a is b for a, b in zip(held, layer.parameters(), strict=True))
    assert layer.A.shape[0] == layer.rank == 4


def test_spare_rows_are_kept_and_not_counted(kind: Any):
    layer, other = kind.build(2, rank_multiple=4), kind.build(1)
    other.load_state_dict(layer.state_dict())
    assert (other.rank, other.capacity) == (2, 4)
    zero = kind.build(1)
    zero.load_state_dict({name: torch.zeros_like(t) for name, t in layer.state_dict().items()})
    assert (zero.rank, zero.capacity) == (1, 4)


@pytest.mark.parametrize("assign", [False, True])
def test_a_dense_state_dict_becomes_its_truncated_svd(kind: Any, form: str, assign: bool):
    layer = kind.build(2, rank_multiple=4)
    layer.set_factors(layer.factors(), form=form)
    dense = layer.dense_twin()
    expected = kind.cls.from_dense(dense, rank=2, rank_multiple=4)
    state = dense.state_dict()
    layer.load_state_dict(state, assign=assign)
    same(layer, expected)
    assert set(state) == ({"weight"} if kind.looks_up else {"weight", "bias"})


def test_a_dense_state_dict_of_the_right_rank_is_exact(kind: Any):
    layer = kind.build(3)
    other = kind.build(3)
    other.load_state_dict(layer.to_dense().state_dict())
    torch.testing.assert_close(other.to_dense().weight, layer.to_dense().weight, **EXACT)
    assert layer.bias is None or torch.equal(other.bias, layer.bias)


def test_a_layer_on_the_meta_device_can_be_assigned(kind: Any):
    meta = kind.cls(*kind.sizes, rank=1, device="meta", dtype=torch.float64)
    layer = kind.build(2)
    for state in (layer.state_dict(), layer.to_dense().state_dict()):
        fresh = copy.deepcopy(meta)
        fresh.load_state_dict(state, assign=True)
        assert not any(p.is_meta for p in fresh.parameters())
    same(copy.deepcopy(layer), layer)


@pytest.mark.parametrize("name", ["A", "B"])
def test_a_missing_factor_is_reported(name: str):
    state = LowRankLinear(7, 5, rank=2).state_dict()
    del state[name]
    with pytest.raises(RuntimeError, match=f'Missing key\\(s\\) in state_dict: "{name}"'):
        LowRankLinear(7, 5, rank=2).load_state_dict(state)


def test_a_state_of_another_size_is_reported():
    layer = LowRankLinear(7, 5, rank=2)
    kept = copy.deepcopy(layer)
    with pytest.raises(RuntimeError, match="size mismatch for"):
        layer.load_state_dict(LowRankLinear(8, 5, rank=3).state_dict())
    assert layer.A.shape == (2, 5)
    # As many numbers, in another order: reshaping would scramble them in silence.
    with pytest.raises(RuntimeError, match="Unexpected key"):
        layer.load_state_dict(nn.Linear(5, 7).state_dict())
    assert torch.equal(layer.A, kept.A)
    with pytest.raises(RuntimeError, match="Unexpected key"):
        LowRankConv2d(2, 4, (3, 2), rank=1).load_state_dict(nn.Conv2d(2, 4, (2, 3)).state_dict())


def test_factors_of_unequal_rank_are_reported():
    state = LowRankLinear(7, 5, rank=2).state_dict()
    state["A"] = torch.zeros(3, 5)
    with pytest.raises(RuntimeError, match="size mismatch for A"):
        LowRankLinear(7, 5, rank=2).load_state_dict(state)


def test_loading_without_strict_leaves_a_layer_that_is_not_mentioned():
    model = nn.Sequential(LowRankLinear(7, 5, rank=2), LowRankLinear(5, 4, rank=2))
    kept = copy.deepcopy(model)
    model.load_state_dict({"0.bias": torch.ones(5)}, strict=False)
    same(model[1], kept[1])
    assert torch.equal(model[0].A, kept[0].A) and torch.equal(model[0].bias, torch.ones(5))


def test_whole_modules_and_states_survive_a_file(kind: Any, form: str, tmp_path: Path):
    layer = kind.build(2, rank_multiple=4).eval()
    layer.set_factors(layer.factors(), form=form)
    torch.save(layer, tmp_path / "layer.pt")
    torch.save(layer.state_dict(), tmp_path / "state.pt")
    whole = torch.load(tmp_path / "layer.pt", weights_only=False)
    same(whole, layer)
    assert not whole.training
    x = kind.inputs()
    assert torch.equal(whole(x), layer(x))
    loaded = kind.build(1)
    loaded.load_state_dict(torch.load(tmp_path / "state.pt", weights_only=True))
    same(loaded, layer)


def test_copies_are_equal_and_contiguous(kind: Any, form: str):
    layer = kind.build(2)
    layer.set_factors(layer.factors(), form=form)
    same(copy.deepcopy(layer), layer)
    same(copy.deepcopy(copy.deepcopy(layer)), layer)
    assert all(tensor.is_contiguous() for tensor in layer.state_dict().values())
