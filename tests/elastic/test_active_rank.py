"""The leading directions of a layer compute as its truncated SVD does, and can be cut out."""

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from dynarank.elastic import Elastic, set_rank_
from dynarank.factorize import factorize_
from dynarank.factors import FactorPair
from dynarank.layers.conv1d import LowRankConv1d
from dynarank.layers.conv2d import LowRankConv2d
from dynarank.layers.conv2d_spatial import LowRankSpatialConv2d
from dynarank.layers.embedding import LowRankEmbedding
from dynarank.layers.linear import LowRankLinear

DOUBLE: Any = {"dtype": torch.float64}
LAYERS = {
    "tall": (lambda rank, **o: LowRankLinear(5, 9, rank=rank, **o), (4, 5)),
    "wide": (lambda rank, **o: LowRankLinear(9, 5, rank=rank, **o), (2, 3, 9)),
    "conv1d": (lambda rank, **o: LowRankConv1d(4, 6, 3, stride=2, rank=rank, **o), (2, 4, 9)),
    "conv2d": (lambda rank, **o: LowRankConv2d(3, 7, (3, 2), padding=1, rank=rank, **o), (2, 3, 5, 6)),
    "spatial": (lambda rank, **o: LowRankSpatialConv2d(3, 5, (3, 2), stride=(2, 1), rank=rank, **o), (2, 3, 7, 6)),
    "embedding": (lambda rank, **o: LowRankEmbedding(9, 5, 2, rank=rank, **o), (3, 4)),
}


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def inputs_of(kind: str) -> Tensor:
    shape = LAYERS[kind][1]
    return torch.randint(9, shape) if kind == "embedding" else draw(*shape, seed=1)


def layer_of(kind: str, rank: int, *, form: str = "pair", **options: Any) -> Any:
    """A layer whose factors are diagonalised, as an optimizer on the manifold leaves them."""
    layer = LAYERS[kind][0](rank, **DOUBLE, **options)
    weight = draw(*layer.weight_shape)
    if kind == "embedding":
        weight[2] = 0
    layer.set_weight_(weight)
    at = layer.factors()
    layer.set_factors(at, form=form)
    return layer


def truncated(layer: Any, rank: int) -> Any:
    """The dense twin with the truncated SVD of the layer's weight."""
    dense = layer.to_dense()
    U, sigma, Vh = torch.linalg.svd(layer.as_matrix(dense.weight.detach()), full_matrices=False)
    matrix = U[:, :rank] @ torch.diag(sigma[:rank]) @ Vh[:rank]
    dense.weight = nn.Parameter(layer.as_weight(matrix).clone())
    return dense


@pytest.mark.parametrize("kind", LAYERS)
@pytest.mark.parametrize(("rank", "active"), [(1, 1), (4, 1), (4, 3), (5, 2), (5, 5)])
@pytest.mark.parametrize("form", ["pair", "core"])
def test_the_leading_directions_compute_the_truncated_svd(kind: str, rank: int, active: int, form: str, truncated: Any):
    layer, x = layer_of(kind, rank, form=form), inputs_of(kind)
    wanted = truncated(layer, active)
    layer.active_rank = active
    torch.testing.assert_close(layer(x), wanted(x), atol=1e-12, rtol=0)
    torch.testing.assert_close(layer.weight.as_subclass(Tensor), wanted.weight, atol=1e-12, rtol=0)
    torch.testing.assert_close(layer.to_dense()(x), wanted(x), atol=1e-12, rtol=0)
    torch.testing.assert_close(layer.to_plain()(x), wanted(x), atol=1e-12, rtol=0)
    assert active in layer.to_plain()[1].weight.shape
    assert (layer.rank, layer.active_rank) == (rank, active)


@pytest.mark.parametrize("kind", ["tall", "wide", "conv2d", "spatial"])
@pytest.mark.parametrize("active", [1, 3])
def test_the_other_directions_get_no_gradient_and_the_leading_ones_their_own(kind: str, active: int, truncated: Any):
    layer, x = layer_of(kind, 4, rank_multiple=3), inputs_of(kind)
    dense = truncated(layer, active)
    dense(x).square().sum().backward()
    G = layer.as_matrix(dense.weight.grad)
    layer.active_rank = active
    layer(x).square().sum().backward()
    assert layer.A.shape[0] > 4 or layer.max_rank <= 5
    for factor, leading in ((layer.A, layer.B.detach()[:active] @ G.mT), (layer.B, layer.A.detach()[:active] @ G)):
        torch.testing.assert_close(factor.grad[:active], leading, atol=1e-10, rtol=1e-10)
        assert not factor.grad[active:].any()


def test_an_unrestricted_layer_computes_what_it_computed_bit_for_bit():
    layer, x = layer_of("wide", 4, rank_multiple=8), inputs_of("wide")
    before = layer(x)
    layer.active_rank = 2
    assert not torch.equal(layer(x), before)
    layer.active_rank = None
    assert torch.equal(layer(x), before)
    assert "active_rank" not in repr(layer)


def test_attention_reads_the_restricted_weight(truncated: Any):
    torch.manual_seed(0)
    attention: Any = nn.MultiheadAttention(6, 2, **DOUBLE)
    factorize_(attention, rank=4, include_head=True, keep_dense_above_break_even=False)
    x, whole = draw(3, 2, 6), copy.deepcopy(attention)
    whole.out_proj.set_weight_(truncated(attention.out_proj, 2).weight, rank=2)
    with Elastic(attention).at({"out_proj": 2}):
        torch.testing.assert_close(attention(x, x, x)[0], whole(x, x, x)[0], atol=1e-12, rtol=0)


def test_what_is_loaded_may_have_fewer_directions():
    layer, small = layer_of("tall", 4), layer_of("tall", 2)
    layer.active_rank = 3
    layer.load_state_dict(small.state_dict())
    assert (layer.rank, layer.active_rank) == (2, 2)
    assert torch.equal(layer(inputs_of("tall")), small(inputs_of("tall")))
    assert layer.state_dict().keys() == small.state_dict().keys()


@pytest.mark.parametrize("count", [0, 5])
def test_a_layer_refuses_ranks_that_it_has_not(count: int):
    layer = layer_of("tall", 4)
    with pytest.raises(ValueError, match=rf"active_rank must be between 1 and the rank, 4, .* got {count}"):
        layer.active_rank = count


@pytest.mark.parametrize("kind", LAYERS)
@pytest.mark.parametrize(("rank", "kept"), [(1, 1), (4, 1), (5, 3)])
@pytest.mark.parametrize("form", ["pair", "core"])
def test_a_cut_is_the_truncated_svd_and_keeps_the_leading_bits(
    kind: str, rank: int, kept: int, form: str, truncated: Any
):
    layer, x = layer_of(kind, rank, form=form), inputs_of(kind)
    wanted, before = truncated(layer, kept), copy.deepcopy(layer.point())
    assert set_rank_(layer, {"": kept}) == {"": kept}
    torch.testing.assert_close(layer(x), wanted(x), atol=1e-12, rtol=0)
    assert (layer.rank, layer.capacity, layer.active_rank, layer.form) == (kept, kept, kept, form)
    if isinstance(before, FactorPair):
        assert torch.equal(layer.A, before.A[:kept]) and torch.equal(layer.B, before.B[:kept])
