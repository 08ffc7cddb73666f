"""A low-rank layer computes what its dense twin with the multiplied weight computes, and so do its gradients."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from dynarank.layers.base import AbstractLowRankLayer
from dynarank.layers.conv1d import LowRankConv1d
from dynarank.layers.conv2d import LowRankConv2d
from dynarank.layers.conv2d_spatial import LowRankSpatialConv2d
from dynarank.layers.conv3d import LowRankConv3d
from dynarank.layers.linear import LowRankLinear

EXACT = {"atol": 1e-12, "rtol": 1e-12}


def in_form(layer: AbstractLowRankLayer, form: str) -> AbstractLowRankLayer:
    layer.set_factors(layer.factors(), form=form)
    return layer


def gradients_of(layer: nn.Module, x: Tensor) -> tuple[Tensor, Tensor | None, dict[str, Tensor]]:
    """Return the output, the gradient of the input and those of the parameters, for a loss that is not linear."""
    x = x.clone().requires_grad_(x.is_floating_point())
    y = layer(x)
    (y.sin().sum() + y.square().sum()).backward()
    assert (x.grad is not None) == x.is_floating_point()
    return y.detach(), x.grad, {name: p.grad for name, p in layer.named_parameters()}


@pytest.mark.parametrize("rank", [1, 2, "max"])
def test_output_is_that_of_the_dense_twin(case: Any, form: str, rank: Any):
    layer = in_form(case.build(min(5, 7) if rank == "max" else rank), form)
    x = case.inputs()
    torch.testing.assert_close(layer(x), layer.to_dense()(x), **EXACT)


def test_output_of_two_plain_layers_is_the_same(case: Any, form: str):
    layer, x = in_form(case.build(), form), case.inputs()
    torch.testing.assert_close(layer.to_plain()(x), layer(x), **EXACT)


def test_gradients_are_projections_of_the_dense_gradient(case: Any, form: str):
    layer, x = in_form(case.build(3), form), case.inputs()
    dense = layer.to_dense()
    if layer.bias is not None:
        dense.bias = nn.Parameter(layer.bias.detach().clone())
    y, dx, grads = gradients_of(layer, x)
    dense_y, dense_dx, dense_grads = gradients_of(dense, x)
    torch.testing.assert_close((y, dx), (dense_y, dense_dx), **EXACT)
    if layer.bias is not None:
        torch.testing.assert_close(grads["bias"], dense_grads["bias"], **EXACT)
    G = layer.as_matrix(dense_grads["weight"])
    if form == "pair":
        torch.testing.assert_close(grads["A"], layer.B @ G.mT, **EXACT)
        torch.testing.assert_close(grads["B"], layer.A @ G, **EXACT)
    else:
        torch.testing.assert_close(grads["S"], layer.U.mT @ G @ layer.V, **EXACT)


def test_weight_is_the_product_in_the_shape_of_the_twin(case: Any, form: str):
    layer = in_form(case.build(), form)
    weight = layer.weight
    assert weight.shape == layer.to_dense().weight.shape == layer.weight_shape
    torch.testing.assert_close(weight.detach().as_subclass(Tensor), layer.to_dense().weight.detach(), **EXACT)
    weight.sum().backward()
    assert all(p.grad is not None for name, p in layer.named_parameters() if name != "bias")


def test_spare_rows_change_nothing(case: Any):
    layer, x = case.build(2), case.inputs()
    roomy = case.build(2, rank_multiple=4)
    roomy.set_factors(layer.point())
    roomy.bias = layer.bias
    assert (layer.capacity, roomy.capacity) == (2, 4)
    torch.testing.assert_close(roomy(x), layer(x), **EXACT)
    torch.testing.assert_close(roomy.to_dense().weight, layer.to_dense().weight, **EXACT)
    assert roomy.to_plain()[1].weight.shape[1] == 2


def test_repr_names_the_options_and_the_rank(kind: Any):
    layer = kind.build(2, rank_multiple=4)
    described = repr(layer)
    assert described.startswith(type(layer).__name__ + "(" + layer.to_dense().extra_repr())
    assert described.endswith("rank=2, capacity=4)")
    assert repr(in_form(layer, "core")).endswith("rank=2, form=core)")


# --- convolutions ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("form", ["pair", "core"])
@pytest.mark.parametrize(
    ("cls", "shape", "memory"),
    [
        (LowRankConv2d, (2, 3, 6, 5), torch.channels_last),
        (LowRankConv2d, (2, 3, 6, 5), torch.contiguous_format),
        (LowRankSpatialConv2d, (2, 3, 6, 5), torch.channels_last),
        (LowRankSpatialConv2d, (2, 3, 6, 5), torch.contiguous_format),
        (LowRankConv3d, (2, 3, 4, 6, 5), torch.channels_last_3d),
        (LowRankConv3d, (2, 3, 4, 6, 5), torch.contiguous_format),
    ],
)
@pytest.mark.parametrize("rank", [1, 2, 7])
def test_output_has_the_memory_format_of_the_twin(cls: Any, shape: Any, memory: Any, form: str, rank: int):
    layer = in_form(cls(3, 8, 3, padding=1, rank=rank, dtype=torch.float64), form)
    x = torch.randn(shape, dtype=torch.float64).to(memory_format=memory)
    y, expected = layer(x), layer.to_dense()(x)
    torch.testing.assert_close(y, expected, **EXACT)
    assert y.is_contiguous(memory_format=memory) == expected.is_contiguous(memory_format=memory)


@pytest.mark.parametrize("memory", [torch.channels_last, torch.contiguous_format])
def test_a_layer_moved_to_channels_last_computes_the_same(memory: Any):
    layer = LowRankConv2d(3, 8, 3, rank=2).to(memory_format=memory)
    x = torch.randn(2, 3, 6, 5)
    torch.testing.assert_close(layer(x.to(memory_format=memory)), layer.to_dense()(x))


def test_gradients_flow_through_channels_last():
    layer = LowRankConv2d(3, 8, 3, rank=2, dtype=torch.float64)
    x = torch.randn(2, 3, 6, 5, dtype=torch.float64)
    plain, last = gradients_of(layer, x)[1:], None
    plain = (plain[0], {name: grad.clone() for name, grad in plain[1].items()})
    layer.zero_grad()
    last = gradients_of(layer, x.to(memory_format=torch.channels_last))[1:]
    torch.testing.assert_close(last[0], plain[0], **EXACT)
    for name, grad in plain[1].items():
        torch.testing.assert_close(last[1][name], grad, **EXACT)


@pytest.mark.parametrize(("cls", "size"), [(LowRankConv1d, 1), (LowRankConv2d, 2), (LowRankConv3d, 3)])
def test_groups_are_refused(cls: Any, size: int):
    with pytest.raises(ValueError, match="needs groups = 1, got 2"):
        cls(4, 4, 3, groups=2, rank=1)


def test_bad_options_are_refused_as_the_twin_refuses_them():
    with pytest.raises(ValueError, match="padding_mode must be"):
        LowRankConv2d(3, 4, 3, padding_mode="mirror", rank=1)
    with pytest.raises(ValueError, match="strided convolutions"):
        LowRankConv2d(3, 4, 3, padding="same", stride=2, rank=1)


def test_wrong_inputs_are_errors():
    with pytest.raises(RuntimeError):
        LowRankConv2d(3, 4, 3, rank=1)(torch.zeros(2, 4, 6, 6))
    with pytest.raises(RuntimeError):
        LowRankConv1d(3, 4, 3, rank=1)(torch.zeros(2, 2, 3, 9))
    with pytest.raises(RuntimeError):
        LowRankLinear(3, 4, rank=1)(torch.zeros(2, 4))


# --- sizes -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("rank", [0, -1, 6])
def test_rank_out_of_range_is_an_error(rank: int):
    with pytest.raises(ValueError, match=rf"rank must be between 1 and min\(5, 7\) = 5, got {rank}"):
        LowRankLinear(7, 5, rank=rank)


def test_zero_sizes_have_no_rank():
    for sizes in ((0, 5), (5, 0)):
        with pytest.raises(ValueError, match="= 0, got 1"):
            LowRankLinear(*sizes, rank=1)


def test_rank_multiple_must_be_positive():
    with pytest.raises(ValueError, match="rank_multiple must be at least 1, got 0"):
        LowRankLinear(7, 5, rank=2, rank_multiple=0)


@pytest.mark.parametrize(("rank", "multiple", "capacity"), [(1, 1, 1), (3, 4, 4), (4, 4, 4), (5, 4, 7), (7, 16, 7)])
def test_capacity_is_the_next_multiple_within_the_largest_rank(rank: int, multiple: int, capacity: int):
    layer = LowRankLinear(9, 7, rank=rank, rank_multiple=multiple)
    assert (layer.rank, layer.capacity, layer.max_rank) == (rank, capacity, 7)
    assert not layer.A[rank:].any() and not layer.B[rank:].any()


def test_layer_starts_at_the_truncated_svd_of_a_fresh_twin(kind: Any):
    torch.manual_seed(3)
    layer = kind.cls(*kind.sizes, rank=2)
    torch.manual_seed(3)
    dense = layer.dense_type(*kind.sizes)
    U, sigma, Vh = torch.linalg.svd(layer.as_matrix(dense.weight), full_matrices=False)
    expected = U[:, :2] @ torch.diag(sigma[:2]) @ Vh[:2]
    torch.testing.assert_close(layer.as_matrix(layer.to_dense().weight), expected, atol=1e-6, rtol=1e-5)
    assert layer.bias is None or torch.equal(layer.bias, dense.bias)
