"""torch's attention and transformer layers read weights past ``forward``; they must compute the same all the same."""

import copy
import warnings
from collections.abc import Iterator
from contextlib import nullcontext
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear

from dynarank.factorize import factorize_, merge_, to_plain_
from dynarank.layers.base import low_rank_layers
from dynarank.layers.linear import LowRankLinear

CLOSE = {"atol": 1e-12, "rtol": 1e-12}
CONTEXTS = {"grad": nullcontext, "no_grad": torch.no_grad, "inference_mode": torch.inference_mode}


def encoder(depth: int = 2, **options: Any) -> Any:
    layer = nn.TransformerEncoderLayer(16, 2, 32, dropout=0.0, batch_first=True, dtype=torch.float64, **options)
    return nn.TransformerEncoder(layer, depth)


@pytest.fixture(params=CONTEXTS.values(), ids=CONTEXTS.keys())
def context(request: pytest.FixtureRequest) -> Any:
    return request.param


@pytest.fixture
def fast_paths(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[str]]:
    """The names of torch's fused kernels, as they are called."""
    called: list[str] = []
    for name in ("_transformer_encoder_layer_fwd", "_native_multi_head_attention"):
        original = getattr(torch, name)
        monkeypatch.setattr(torch, name, lambda *a, name=name, f=original: called.append(name) or f(*a))
    return called


@pytest.fixture
def products(monkeypatch: pytest.MonkeyPatch) -> list[LowRankLinear]:
    """The layers whose dense weight was built, as it is built."""
    built: list[LowRankLinear] = []
    original = LowRankLinear._dense_weight
    monkeypatch.setattr(LowRankLinear, "_dense_weight", lambda layer: built.append(layer) or original(layer))
    return built


# --- attention -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("options", [{}, {"kdim": 8, "vdim": 12}, {"bias": False}, {"add_bias_kv": True}])
def test_attention_computes_what_the_merged_one_does(training: bool, options: Any, context: Any):
    model = nn.ModuleDict({"attention": nn.MultiheadAttention(16, 4, batch_first=True, dtype=torch.float64, **options)})
    report = factorize_(model, rank=3, include_head=True)
    attention = model["attention"].train(training)
    assert isinstance(attention.out_proj, LowRankLinear)
    merged = copy.deepcopy(model)
    merge_(merged)
    assert type(merged["attention"].out_proj) is NonDynamicallyQuantizableLinear
    q = torch.randn(2, 5, 16, dtype=torch.float64)
    k, v = (q[..., : options.get(name, 16)] for name in ("kdim", "vdim"))
    k, v = (q, q) if not options.get("kdim") else (k, v)
    with context():
        torch.testing.assert_close(attention(q, k, v), merged["attention"](q, k, v), **CLOSE)
    notes = {entry.name: (entry.reason, entry.note) for entry in report.entries}
    assert "multiplies it out in each forward pass" in notes["attention.out_proj"][1]
    packed = [name for name in notes if name != "attention.out_proj"]
    assert packed and "bare parameters and no layers" in notes[packed[0]][0]


def test_gradients_of_attention_are_true():
    model = nn.ModuleDict({"attention": nn.MultiheadAttention(16, 4, dtype=torch.float64)})
    factorize_(model, rank=3, include_head=True)
    low_rank, merged = model["attention"], copy.deepcopy(model)
    merge_(merged)
    dense, x = merged["attention"], torch.randn(5, 2, 16, dtype=torch.float64)
    for attention in (low_rank, dense):
        attention(x, x, x)[0].square().sum().backward()
    G = dense.out_proj.weight.grad
    torch.testing.assert_close(low_rank.out_proj.A.grad, low_rank.out_proj.B @ G.mT, **CLOSE)
    torch.testing.assert_close(low_rank.out_proj.B.grad, low_rank.out_proj.A @ G, **CLOSE)
    torch.testing.assert_close(low_rank.in_proj_weight.grad, dense.in_proj_weight.grad, **CLOSE)


# --- encoder layers --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("norm_first", [True, False])
@pytest.mark.parametrize("activation", ["relu", "gelu"])
def test_an_encoder_layer_computes_what_the_merged_one_does(
    training: bool, norm_first: bool, activation: str, context: Any
):
    layer = nn.TransformerEncoderLayer(
        16, 2, 32, dropout=0.0, activation=activation, norm_first=norm_first, batch_first=True, dtype=torch.float64
    )
    factorize_(layer.train(training), rank=3)
    assert set(low_rank_layers(layer)) == {"linear1", "linear2", "self_attn.out_proj"}
    x = torch.randn(2, 5, 16, dtype=torch.float64)
    for convert in (merge_, to_plain_):
        other = copy.deepcopy(layer)
        convert(other)
        with context():
            torch.testing.assert_close(layer(x), other(x), **CLOSE)


def test_the_inference_fast_path_is_declined_before_weights_are_built(
    fast_paths: list[str], products: list[LowRankLinear], context: Any
):
    model = encoder().eval()
    x = torch.randn(2, 5, 16, dtype=torch.float64)
    with torch.no_grad():
        model(x)
    assert fast_paths == ["_transformer_encoder_layer_fwd"] * 2
    fast_paths.clear()
    report = factorize_(model, rank=3)
    assert any("fast path" in note for note in report.notes)
    with context():
        model(x)
    assert not fast_paths
    assert {id(layer) for layer in products} == {id(layer.self_attn.out_proj) for layer in model.layers}
    merge_(model)
    with torch.no_grad():
        model(x)
    assert fast_paths == ["_transformer_encoder_layer_fwd"] * 2


def test_a_layer_put_in_by_hand_declines_the_fast_path_too(fast_paths: list[str], context: Any):
    layer = encoder(1).eval().layers[0]
    layer.linear1 = LowRankLinear.from_dense(layer.linear1, rank=3)
    merged = copy.deepcopy(layer)
    merged.linear1 = layer.linear1.to_dense()
    x = torch.randn(2, 5, 16, dtype=torch.float64)
    with context():
        y = layer(x)
    assert "_transformer_encoder_layer_fwd" not in fast_paths
    torch.testing.assert_close(y, merged(x), **CLOSE)


def test_a_model_without_transformer_layers_has_no_note():
    report = factorize_(nn.Sequential(nn.Linear(16, 16), nn.Linear(16, 4)))
    assert not report.notes


# --- padding and nested tensors --------------------------------------------------------------------------------------


def padded() -> tuple[torch.Tensor, torch.Tensor]:
    """A batch of three sequences of lengths 5, 3 and 1, and its padding mask."""
    mask = torch.arange(5) >= torch.tensor([5, 3, 1]).unsqueeze(1)
    return torch.randn(3, 5, 16, dtype=torch.float64), mask


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("target", [None, ["layers.0.linear1"], ["layers.1.linear2"], ["layers.2.self_attn.out_proj"]])
def test_padding_gives_what_the_merged_model_gives(training: bool, target: Any, context: Any):
    model = encoder(3)
    factorize_(model.train(training), rank=3, target_modules=target)
    x, mask = padded()
    for convert in (merge_, to_plain_):
        other = copy.deepcopy(model)
        convert(other)
        with context(), warnings.catch_warnings(action="ignore" if other.use_nested_tensor else "error"):
            y, expected = model(x, src_key_padding_mask=mask), other(x, src_key_padding_mask=mask)
        torch.testing.assert_close(y[~mask], expected[~mask], **CLOSE)
        assert y.shape == expected.shape


def test_padding_raises_no_warning(context: Any):
    model = encoder().eval()
    factorize_(model, rank=3)
    x, mask = padded()
    with context(), warnings.catch_warnings(action="error"):
        model(x, src_key_padding_mask=mask)


def test_merging_restores_torchs_own_switches():
    model, untouched = encoder().eval(), encoder().eval()
    vars_before = [dict(vars(m)).keys() for m in model.modules()]
    factorize_(model, rank=3)
    assert not model.use_nested_tensor and not model.layers[0].activation_relu_or_gelu
    factorize_(model, rank=3)
    merge_(model, modules=["linear1"])
    assert not model.use_nested_tensor and not model.layers[0].activation_relu_or_gelu
    merge_(model)
    assert model.use_nested_tensor is untouched.use_nested_tensor is True
    assert [layer.activation_relu_or_gelu for layer in model.layers] == [1, 1]
    assert [dict(vars(m)).keys() for m in model.modules()] == vars_before


def test_layers_that_stay_dense_keep_their_fast_path(fast_paths: list[str]):
    model = encoder(3).eval()
    factorize_(model, rank=3, target_modules=["layers.1.linear1"])
    with torch.no_grad():
        model(torch.randn(2, 5, 16, dtype=torch.float64))
    assert fast_paths.count("_transformer_encoder_layer_fwd") == 2


def test_a_whole_transformer_trains_and_merges():
    model = nn.Transformer(16, 2, 1, 1, 32, dropout=0.0, batch_first=True, dtype=torch.float64)
    factorize_(model, rank=3)
    source, target = torch.randn(2, 5, 16, dtype=torch.float64), torch.randn(2, 4, 16, dtype=torch.float64)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    losses = []
    for _ in range(5):
        optimizer.zero_grad()
        loss = model(source, target).square().mean() + (model(source, target) - 1).square().mean()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0]
    model.eval()
    y = model(source, target)
    merge_(model)
    torch.testing.assert_close(model(source, target), y, **CLOSE)


def test_an_encoder_layer_compiles_and_copies():
    model = encoder(1).eval()
    factorize_(model, rank=3)
    x = torch.randn(2, 5, 16, dtype=torch.float64)
    y = model(x)
    torch.testing.assert_close(torch.compile(model, backend="eager")(x), y, **CLOSE)
    torch.testing.assert_close(copy.deepcopy(model)(x), y, **CLOSE)
