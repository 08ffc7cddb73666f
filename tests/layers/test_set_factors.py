"""A layer changes only through ``set_factors``, and its parameters keep their identity when their shape changes."""

import copy
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from dynarank.factors import FactorPair, LowRankFactors
from dynarank.layers.conv2d import LowRankConv2d
from dynarank.layers.linear import LowRankLinear

INITIALISERS = (
    *("eye_", "kaiming_normal_", "kaiming_uniform_", "normal_", "ones_", "orthogonal_", "trunc_normal_", "uniform_"),
    *("xavier_normal_", "xavier_uniform_", "zeros_"),
)
EXACT = {"atol": 1e-12, "rtol": 1e-12}


def random_pair(layer: Any, rank: int) -> FactorPair:
    m, n = layer.matrix_shape
    return FactorPair(torch.randn(rank, m, dtype=torch.float64), torch.randn(rank, n, dtype=torch.float64))


def linear(rank: int = 2, **options: Any) -> LowRankLinear:
    return LowRankLinear(9, 7, rank=rank, dtype=torch.float64, **options)


# --- what is set is what is there ----------------------------------------------------------------------------------


@pytest.mark.parametrize("rank", [1, 2, 4, 5])
@pytest.mark.parametrize("multiple", [1, 4])
def test_a_pair_is_stored_as_it_is(kind: Any, rank: int, multiple: int):
    layer = kind.build(2, rank_multiple=multiple)
    pair = random_pair(layer, rank)
    layer.set_factors(pair)
    assert (layer.rank, layer.form, layer.capacity) == (rank, "pair", layer.capacity_for(rank))
    assert torch.equal(layer.point().A, pair.A) and torch.equal(layer.point().B, pair.B)
    assert not layer.A[rank:].any() and not layer.B[rank:].any()
    W = layer.as_matrix(layer.to_dense().weight)
    torch.testing.assert_close(W, nn.Parameter(pair.A.mT @ pair.B), **EXACT)


def test_forms_change_into_each_other_without_changing_the_weight(kind: Any):
    layer = kind.build(2, rank_multiple=4)
    W = layer.weight.detach().clone()
    layer.set_factors(layer.point(), form="core")
    assert layer.form == "core" and layer.A is None and layer.capacity == layer.rank == 2
    torch.testing.assert_close(layer.weight, W, **EXACT, check_dtype=False)
    U, V = layer.U, layer.V
    torch.testing.assert_close(U.mT @ U, torch.eye(2, dtype=U.dtype), **EXACT)
    torch.testing.assert_close(V.mT @ V, torch.eye(2, dtype=V.dtype), **EXACT)
    layer.set_factors(layer.point(), form="pair")
    assert layer.form == "pair" and layer.S is None and layer.capacity == layer.capacity_for(2)
    torch.testing.assert_close(layer.weight, W, **EXACT, check_dtype=False)
    torch.testing.assert_close(layer.A.square().sum(1), layer.B.square().sum(1), **EXACT)  # balanced


def test_factors_are_read_back_orthonormal_and_diagonal(kind: Any, form: str):
    layer = kind.build(3)
    W = layer.as_matrix(layer.weight.detach())
    layer.set_factors(layer.point(), form=form)
    read = layer.factors()
    torch.testing.assert_close(read.to_dense(), W, **EXACT, check_dtype=False)
    torch.testing.assert_close(read.U.mT @ read.U, torch.eye(3, dtype=W.dtype), **EXACT)
    torch.testing.assert_close(read.sigma, torch.linalg.svdvals(W)[:3], **EXACT, check_dtype=False)


def test_own_rows_may_be_set_in_another_order():
    for layer in (linear(4), linear(4, rank_multiple=2)):
        point = copy.deepcopy(layer.point())
        layer.set_factors(FactorPair(layer.point().A[1:], layer.point().B[1:]))
        assert layer.rank == 3
        assert torch.equal(layer.point().A, point.A[1:]) and torch.equal(layer.point().B, point.B[1:])


def test_a_weight_can_be_set_with_another_rank(kind: Any, form: str):
    layer = kind.build(2)
    layer.set_factors(layer.point(), form=form)
    weight = torch.randn(layer.weight_shape, dtype=torch.float64)
    layer.set_weight_(weight)
    assert (layer.rank, layer.form) == (2, form)
    layer.set_weight_(weight, rank=layer.max_rank)
    assert (layer.rank, layer.form) == (layer.max_rank, form)
    torch.testing.assert_close(layer.to_dense().weight.detach(), weight, **EXACT)


# --- what is refused -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("pair", "got"),
    [
        (FactorPair(torch.zeros(2, 9), torch.zeros(2, 7)), r"got shape \(9, 7\) with rank 2"),
        (FactorPair(torch.zeros(0, 7), torch.zeros(0, 9)), r"got shape \(7, 9\) with rank 0"),
        (FactorPair(torch.zeros(8, 7), torch.zeros(8, 9)), r"got shape \(7, 9\) with rank 8"),
        (LowRankFactors(torch.zeros(6, 2), torch.zeros(2, 2), torch.zeros(9, 2)), r"got shape \(6, 9\) with rank 2"),
    ],
)
def test_factors_that_do_not_fit_are_refused(pair: Any, got: str):
    layer = linear()
    kept = copy.deepcopy(layer)
    with pytest.raises(ValueError, match=r"factors must be of a \(7, 9\) matrix with rank 1 to 7, " + got):
        layer.set_factors(pair)
    assert torch.equal(layer.A, kept.A) and layer.rank == 2


@pytest.mark.parametrize("name", ["constant_", "sparse_"])
def test_initialisers_with_a_value_are_refused(name: str):
    with pytest.raises(RuntimeError, match="weight of a low-rank layer is read-only"):
        getattr(nn.init, name)(linear().weight, 0.5)


@pytest.mark.parametrize("name", INITIALISERS)
def test_initialisers_are_refused(name: str):
    layer = linear()
    kept = copy.deepcopy(layer)
    with pytest.raises(RuntimeError, match=r"read-only.*use layer.set_weight_"):
        getattr(nn.init, name)(layer.weight)
    assert torch.equal(layer.A, kept.A) and torch.equal(layer.B, kept.B)


def test_convolutional_initialisers_are_refused():
    with pytest.raises(RuntimeError, match="read-only"):
        nn.init.dirac_(LowRankConv2d(3, 4, 3, rank=1).weight)


def assign_data(layer: Any) -> None:
    layer.weight.data = torch.zeros(7, 9)


def assign_item(layer: Any) -> None:
    layer.weight[0] = 1.0


def freeze(layer: Any) -> None:
    layer.weight.requires_grad = False


WRITES: dict[str, Callable[[Any], Any]] = {
    "copy_": lambda layer: layer.weight.copy_(torch.zeros(7, 9)),
    "data.normal_": lambda layer: layer.weight.data.normal_(0, 0.02),
    "data.copy_": lambda layer: layer.weight.data.copy_(torch.zeros(7, 9)),
    "data.t().zero_": lambda layer: layer.weight.data.t().zero_(),
    "data =": assign_data,
    "[0] =": assign_item,
    "[0].zero_": lambda layer: layer.weight[0].zero_(),
    "view.zero_": lambda layer: layer.weight.view(-1).zero_(),
    "detach.mul_": lambda layer: layer.weight.detach().mul_(2),
    "requires_grad =": freeze,
    "requires_grad_": lambda layer: layer.weight.requires_grad_(False),
    "out=": lambda layer: torch.zeros(7, 9, dtype=torch.float64, out=layer.weight),
}


@pytest.mark.parametrize("write", WRITES.values(), ids=WRITES.keys())
def test_writing_to_the_weight_is_refused(write: Callable[[Any], Any]):
    with torch.no_grad(), pytest.raises(RuntimeError, match="weight of a low-rank layer is read-only"):
        write(linear())


@pytest.mark.parametrize("value", [nn.Parameter(torch.zeros(7, 9)), torch.zeros(7, 9), None])
def test_assigning_the_weight_is_refused(value: Any):
    layer = linear()
    with pytest.raises(AttributeError, match=r"read-only: it is the product.*set_weight_\(tensor\)"):
        layer.weight = value
    with pytest.raises(AttributeError, match="read-only"):
        layer.register_parameter("weight", value)
    assert "weight" not in dict(layer.named_parameters())


def test_weight_reads_like_a_plain_tensor():
    layer = linear()
    weight = layer.weight
    assert type(weight + 1) is Tensor and type(weight.clone()) is Tensor and type(weight @ weight.mT) is Tensor
    copied = weight.clone()
    copied.detach().zero_()
    other = nn.Linear(9, 7, dtype=torch.float64)
    other.weight.data.copy_(weight)
    assert torch.equal(other.weight, layer.to_dense().weight)
    weight.square().sum().backward()
    assert layer.A.grad is not None and layer.B.grad is not None


# --- a change of shape ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("rank", [1, 5])
def test_a_resize_keeps_identity_attributes_and_hooks(kind: Any, rank: int):
    layer = kind.build(2)
    layer.A.tag = "mine"
    seen: list[str] = []
    layer.A.register_hook(lambda grad: seen.append("hook"))
    layer.B.register_post_accumulate_grad_hook(lambda p: seen.append("accumulated"))
    held, x = list(layer.parameters()), kind.inputs()
    loss = layer(x).square().sum()
    loss.backward()
    layer.set_factors(random_pair(layer, rank))  # while the loss is alive, as it is inside optimizer.step()
    assert all(a is b for a, b in zip(held, layer.parameters(), strict=True))
    assert layer.A.shape[0] == layer.B.shape[0] == layer.rank == rank
    assert layer.A.tag == "mine" and layer.A.grad is None and layer.A.is_leaf and layer.A.requires_grad
    loss = layer(x).square().sum()
    loss.backward()
    assert layer.A.grad.shape == layer.A.shape and torch.isfinite(loss)
    assert sorted(seen) == ["accumulated", "accumulated", "hook", "hook"]


def test_a_resize_needs_no_optimizer_to_be_rebuilt():
    layer, x = linear(2), torch.randn(5, 9, dtype=torch.float64)
    optimizer = torch.optim.SGD(layer.parameters(), lr=0.1)
    for rank in (4, 1, 7, 2):
        loss = layer(x).square().sum()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        layer.set_factors(random_pair(layer, rank))
        before = layer.A.detach().clone()
        layer(x).square().sum().backward()
        optimizer.step()
        assert not torch.equal(layer.A, before)


def refused(layer: Any) -> None:
    """Check that a change of shape is refused and leaves everything as it was."""
    kept = {name: tensor.clone() for name, tensor in layer.state_dict().items()}
    assert "a live graph" in (why := layer.resize_refusal() or "") or "weak reference" in why
    with pytest.raises(RuntimeError, match=r"cannot become \(5, .*Delete old losses and outputs first"):
        layer.set_factors(random_pair(layer, 5))
    assert (layer.rank, layer.capacity) == (2, 2)
    assert all(torch.equal(tensor, kept[name]) for name, tensor in layer.state_dict().items())


def test_a_loss_that_was_never_backwarded_refuses_a_resize(kind: Any):
    layer, x = kind.build(2), kind.inputs()
    loss = layer(x).square().sum()
    refused(layer)
    within = FactorPair(layer.point().A[:1] * 2, layer.point().B[:1])
    layer.set_factors(within, resize=False)  # inside the capacity nothing stands against it
    assert (layer.rank, layer.capacity) == (1, 2)
    del loss
    assert layer.resize_refusal() is None
    layer.set_factors(random_pair(layer, 5))
    assert layer.rank == 5


@pytest.mark.parametrize("name", ["A", "B"])
def test_one_refusing_factor_refuses_both(name: str):
    layer = linear(2)
    reference = weakref.ref(getattr(layer, name))
    refused(layer)
    assert reference() is getattr(layer, name)


def test_a_retained_graph_refuses_a_resize_until_it_is_gone():
    layer, x = linear(2), torch.randn(5, 9, dtype=torch.float64)
    loss = layer(x).square().sum()
    loss.backward(retain_graph=True)
    if layer.resize_refusal() is not None:
        refused(layer)
    del loss
    assert layer.resize_refusal() is None


def test_within_the_capacity_addresses_stay():
    layer = linear(2, rank_multiple=4)
    addresses = [p.data_ptr() for p in layer.parameters()]
    for rank in (4, 1, 3):
        assert layer.fits(rank)
        layer.set_factors(random_pair(layer, rank))
        assert layer.rank == rank and not layer.A[rank:].any()
    assert [p.data_ptr() for p in layer.parameters()] == addresses
    assert not layer.fits(5)
    layer.set_factors(random_pair(layer, 1), resize=False)
    assert (layer.rank, layer.capacity) == (1, 4)


# --- gradients of the stored factors ----------------------------------------------------------------------------------


def test_the_gradient_of_the_point_leaves_spare_rows_out(kind: Any):
    layer, x = kind.build(2, rank_multiple=4), kind.inputs()
    assert layer.point_gradient() is None
    layer(x).square().sum().backward()
    gradient = layer.point_gradient()
    assert torch.equal(gradient.A, layer.A.grad[:2]) and gradient.B.shape == layer.point().B.shape
    layer.set_factors(layer.factors(), form="core")
    layer(x).square().sum().backward()
    assert torch.equal(layer.point_gradient(), layer.S.grad)


def test_one_frozen_factor_is_an_error():
    layer = linear()
    layer.B.requires_grad_(False)
    layer(torch.ones(1, 9, dtype=torch.float64)).sum().backward()
    with pytest.raises(RuntimeError, match="A and B of a low-rank layer must both be trainable or both frozen"):
        layer.point_gradient()
