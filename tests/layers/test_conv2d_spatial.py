"""What sets the spatial layer apart: its matrix is another than the flattened weight; the rest is the contract."""

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from dynarank._discovery import discover
from dynarank.factorize import deployed_parameters, factorize_, merge_, to_plain_
from dynarank.factorize.sites import choose_sites
from dynarank.layers._factored import AbstractFactoredLayer
from dynarank.layers.conv2d import LowRankConv2d
from dynarank.layers.conv2d_spatial import LowRankSpatialConv2d
from dynarank.optim.low_rank_optimizer import LowRankOptimizer
from dynarank.ranks.fixed import Fixed

EXACT = {"atol": 1e-12, "rtol": 1e-12}


def layer_of(rank: int = 2, **options: Any) -> LowRankSpatialConv2d:
    return LowRankSpatialConv2d(3, 4, (5, 2), **options, rank=rank, dtype=torch.float64)


def test_the_matrix_has_outputs_by_columns_and_inputs_by_rows():
    layer = layer_of()
    assert layer.matrix_shape == (4 * 2, 3 * 5)
    weight = torch.randn(layer.weight_shape, dtype=torch.float64)
    M = layer.as_matrix(weight)
    for o, i, a, b in [(0, 0, 0, 0), (3, 2, 4, 1), (1, 2, 3, 0), (2, 0, 1, 1)]:
        assert M[o * 2 + b, i * 5 + a] == weight[o, i, a, b]
    assert torch.equal(layer.as_weight(M), weight)


def test_a_separable_kernel_has_rank_one():
    dense = nn.Conv2d(3, 4, (5, 2), dtype=torch.float64)
    with torch.no_grad():
        across, down = torch.randn(4, 2, dtype=torch.float64), torch.randn(3, 5, dtype=torch.float64)
        dense.weight.copy_(torch.einsum("ob,ia->oiab", across, down))
    layer, x = LowRankSpatialConv2d.from_dense(dense, rank=1), torch.randn(2, 3, 8, 6, dtype=torch.float64)
    torch.testing.assert_close(layer(x), dense(x), **EXACT)
    z = F.conv2d(x, down.reshape(1, 3, 5, 1))  # one channel is enough
    torch.testing.assert_close(layer(x), F.conv2d(z, across.reshape(4, 1, 1, 2), dense.bias), **EXACT)


def test_two_plain_layers_share_out_the_options():
    first, second = layer_of(stride=(2, 1), padding=(3, 1), dilation=(1, 2)).to_plain()
    assert isinstance(first, nn.Conv2d) and isinstance(second, nn.Conv2d)
    assert (first.in_channels, first.out_channels, first.kernel_size) == (3, 2, (5, 1))
    assert (first.stride, first.padding, first.dilation, first.bias) == ((2, 1), (3, 0), (1, 1), None)
    assert (second.in_channels, second.out_channels, second.kernel_size) == (2, 4, (1, 2))
    assert (second.stride, second.padding, second.dilation) == ((1, 1), (0, 1), (1, 2))


def test_bad_options_are_refused_as_the_twin_refuses_them():
    with pytest.raises(ValueError, match="LowRankSpatialConv2d needs groups = 1, got 2"):
        LowRankSpatialConv2d(4, 4, 3, groups=2, rank=1)
    with pytest.raises(ValueError, match=r"rank must be between 1 and min\(8, 15\) = 8, got 9"):
        layer_of(9)
    with pytest.raises(ValueError, match="padding_mode must be"):
        layer_of(padding_mode="mirror")
    with pytest.raises(ValueError, match="strided convolutions"):
        layer_of(padding="same", stride=2)


def test_a_dense_weight_of_another_kernel_is_reported():
    with pytest.raises(RuntimeError, match="Unexpected key"):  # as many numbers, in another order
        layer_of().load_state_dict(nn.Conv2d(3, 4, (2, 5)).state_dict())


@pytest.mark.parametrize(("rank", "convolutions"), [(5, 2), (6, 1)])
def test_above_break_even_the_weight_is_multiplied_out(rank: int, convolutions: int):
    layer = layer_of(rank)  # 8 * 15 / (8 + 15) = 5.2
    with FlopCounterMode(display=False) as counter:
        layer(torch.randn(2, 3, 8, 6, dtype=torch.float64))
    counts = counter.get_flop_counts()["Global"]
    dense, product = 2 * 2 * 4 * 30 * 20, 2 * rank * 8 * 15
    parts = 2 * 2 * 4 * 6 * rank * 15 + 2 * 2 * 20 * rank * 8
    assert sum(counts.values()) == (parts if convolutions == 2 else dense + product)
    assert deployed_parameters(layer) == (115 if convolutions == 2 else 120) + 4


def test_it_trains_on_the_manifold_and_changes_its_rank():
    torch.manual_seed(0)
    model, x = nn.Sequential(layer_of(4)), torch.randn(6, 3, 8, 7, dtype=torch.float64)
    target = layer_of(2)(x).detach()
    optimizer = LowRankOptimizer(model, rank_policy=Fixed(2))
    losses = []
    for step in range(60):
        loss = F.mse_loss(model(x), target)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
        if step == 20:
            optimizer.change_ranks()
    layer: Any = model[0]
    assert layer.rank == 2 and losses[-1] < 0.1 * losses[0]


# --- among the other layers ----------------------------------------------------------------------------------------


def test_dense_convolutions_still_become_filters_and_1x1():
    kinds = list(discover("dynarank.layers", AbstractFactoredLayer))
    assert kinds.index("conv2d") < kinds.index("conv2d_spatial")
    model = nn.Sequential(nn.Conv2d(8, 9, 3), nn.ReLU(), nn.Conv2d(9, 8, 3), nn.Flatten(), nn.Linear(8, 2))
    report = factorize_(model, rank=2)
    assert type(model[0]) is type(model[2]) is LowRankConv2d
    assert [entry.kind for entry in report.entries[:2]] == ["conv2d", "conv2d"]


def test_it_is_recognised_as_a_low_rank_layer():
    model = nn.Sequential(layer_of(), nn.ReLU(), nn.Conv2d(4, 8, 3), nn.Flatten(), nn.Linear(8, 2))
    (first, *_) = choose_sites(model)
    assert (first.site.kind, first.site.low_rank, first.site.twin) == ("conv2d_spatial", True, LowRankSpatialConv2d)
    assert first.reason == "" and first.site.obstacle == ""
    kept = model[0]
    factorize_(model, rank=1, target_modules="conv")
    assert model[0] is kept and type(model[2]) is LowRankConv2d


@pytest.mark.parametrize("back", [merge_, to_plain_])
def test_it_is_made_dense_or_plain_with_the_model(back: Any):
    model, x = nn.Sequential(layer_of(), nn.ReLU()), torch.randn(2, 3, 8, 7, dtype=torch.float64)
    expected = model(x)
    report = back(model)
    assert report.entries[0].error < 1e-12
    assert type(model[0]) is (nn.Conv2d if back is merge_ else nn.Sequential)
    torch.testing.assert_close(model(x), expected, **EXACT)
