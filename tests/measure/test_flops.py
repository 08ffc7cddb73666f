"""FLOPs are those of the formulas one writes by hand."""

from typing import Any

import pytest
import torch
from torch import nn

from dynarank.layers.conv2d import LowRankConv2d
from dynarank.layers.linear import LowRankLinear
from dynarank.measure import flops, trace

N, T, D, H = 3, 5, 8, 2  # sequences, tokens, width, heads
ATTENTION = N * (4 * 2 * T * D * D + 2 * 2 * T * T * D)  # four projections, scores, mixture


class SelfAttention(nn.Module):
    def __init__(self, *, causal: bool = False) -> None:
        super().__init__()
        self.causal = causal
        self.qkv, self.out = nn.Linear(D, 3 * D), nn.Linear(D, D)

    def forward(self, x: Any) -> Any:
        q, k, v = self.qkv(x).unflatten(-1, (3 * H, -1)).transpose(1, 2).chunk(3, 1)
        mixed = nn.functional.scaled_dot_product_attention(q, k, v, is_causal=self.causal)
        return self.out(mixed.transpose(1, 2).flatten(2))


class Torch(nn.Module):
    def __init__(self, *, need_weights: bool) -> None:
        super().__init__()
        self.need_weights = need_weights
        self.attention = nn.MultiheadAttention(D, H, batch_first=True)

    def forward(self, x: Any) -> Any:
        return self.attention(x, x, x, need_weights=self.need_weights)


@pytest.mark.parametrize(
    "model",
    [SelfAttention(), SelfAttention(causal=True), Torch(need_weights=False), Torch(need_weights=True)],
    ids=["plain", "causal", "torch", "torch-with-weights"],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_attention(model: nn.Module, dtype: torch.dtype):
    assert flops(model.to(dtype), torch.randn(N, T, D, dtype=dtype)) == ATTENTION


def test_a_transformer_layer_of_torch():
    layer = nn.TransformerEncoderLayer(D, H, 4 * D, batch_first=True)
    assert flops(layer, torch.randn(N, T, D)) == ATTENTION + 2 * N * T * 2 * D * 4 * D
    assert flops(nn.TransformerEncoder(layer, 2), torch.randn(N, T, D)) == 2 * flops(layer, torch.randn(N, T, D))


@pytest.mark.parametrize("shape", [(5,), (3, 5), (2, 3, 5)])
def test_a_linear_layer(shape: tuple[int, ...]):
    x = torch.zeros(shape)
    assert flops(nn.Linear(5, 7), x) == 2 * 7 * x.numel()
    assert flops(LowRankLinear(5, 7, rank=2), x) == 2 * 2 * (5 + 7) * x.numel() // 5
    assert flops(LowRankLinear(5, 7, rank=3), x) == 2 * 3 * (5 + 7) * x.numel() // 5


def test_a_linear_layer_above_break_even_builds_its_weight_for_many_rows():
    # At rank 3 a row costs 36 products in two steps and 35 in one, and W itself 105.
    assert flops(LowRankLinear(5, 7, rank=3), torch.zeros(105, 5)) == 2 * 36 * 105
    assert flops(LowRankLinear(5, 7, rank=3), torch.zeros(106, 5)) == 2 * (35 * 106 + 105)


def test_a_convolution_multiplies_its_weight_with_the_rows_of_its_trace():
    x = torch.zeros(2, 3, 7, 6)
    layer = nn.Conv2d(3, 8, (3, 2), stride=(2, 1), padding=1)
    rows = trace(layer, {"layer": layer}, x)["layer"].rows
    assert flops(layer, x) == 2 * rows * layer.weight.numel()
    twin = LowRankConv2d.from_dense(layer, rank=2)
    assert flops(twin, x) == 2 * rows * 2 * (8 + 18)


def test_matrices_times_vectors():
    A, x = torch.zeros(7, 5), torch.zeros(5)
    assert flops(nn.Identity(), A, forward=lambda model, batch: A @ x) == 2 * 35
    assert flops(nn.Identity(), A, forward=lambda model, batch: torch.addmv(torch.zeros(7), A, x)) == 2 * 35
    assert flops(nn.Identity(), A, forward=lambda model, batch: x @ x) == 2 * 5
    B = torch.zeros(4, 5, 2)
    added = lambda model, batch: torch.addbmm(torch.zeros(7, 2), A.expand(4, 7, 5), B)  # noqa: E731
    assert flops(nn.Identity(), A, forward=added) == 2 * 4 * 7 * 5 * 2


@pytest.mark.parametrize(("cls", "gates"), [(nn.LSTM, 4), (nn.GRU, 3), (nn.RNN, 1)])
def test_recurrent_layers(cls: Any, gates: int):
    model = cls(5, 7, num_layers=2, bidirectional=True)
    weights = sum(p.numel() for p in model.parameters() if p.dim() == 2)
    assert weights == 2 * gates * 7 * (5 + 7 + 14 + 7)
    assert flops(model, torch.zeros(6, 3, 5)) == 2 * 6 * 3 * weights


def test_the_model_is_left_as_it_was(attention: Any, state_of: Any):
    before = state_of(attention)
    flops(attention, torch.zeros(2, 5, 6, dtype=torch.float64))
    with pytest.raises(RuntimeError):
        flops(attention, torch.zeros(2, 5, 7, dtype=torch.float64))
    assert state_of(attention) == before
