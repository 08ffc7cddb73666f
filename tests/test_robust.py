"""The penalty is that of the dense singular values, its gradients are true ones, and it evens out a spectrum."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from dynarank.factors import FactorPair, LowRankFactors, diagonalise, from_dense, read_pair
from dynarank.layers.base import AbstractLowRankLayer
from dynarank.layers.conv2d import LowRankConv2d
from dynarank.layers.conv2d_tucker import LowRankTuckerConv2d
from dynarank.layers.linear import LowRankLinear
from dynarank.optim.low_rank_optimizer import LowRankOptimizer
from dynarank.ranks.fixed import Fixed
from dynarank.robust import condition_penalty

SIZES = [(7, 5, 1), (5, 7, 3), (7, 5, 5), (6, 6, 2)]


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def random_layer(m: int, n: int, rank: int, *, rank_multiple: int = 1, form: str = "pair") -> LowRankLinear:
    """A layer whose factors are in no particular gauge."""
    layer = LowRankLinear(n, m, rank=rank, rank_multiple=rank_multiple).double()
    pair = FactorPair(draw(rank, m), draw(rank, n, seed=1))
    layer.set_factors(pair if form == "pair" else read_pair(pair))
    return layer


def dense_penalty(W: Tensor, rank: int) -> Tensor:
    """The same function of a dense matrix of that rank, without singular values: a polynomial."""
    gram = W @ W.mT
    return (gram @ gram).trace() - gram.trace() ** 2 / rank


def weight_of(layer: AbstractLowRankLayer) -> Tensor:
    return layer.as_matrix(layer.weight.detach().as_subclass(Tensor))


@pytest.mark.parametrize(("m", "n", "rank"), SIZES)
@pytest.mark.parametrize("form", ["pair", "core"])
def test_it_is_the_spread_of_the_squared_singular_values(m: int, n: int, rank: int, form: str):
    layer = random_layer(m, n, rank, form=form)
    squares = torch.linalg.svdvals(weight_of(layer))[:rank].square()
    found = condition_penalty(layer)
    torch.testing.assert_close(found, (squares - squares.mean()).square().sum(), atol=1e-9, rtol=1e-12)
    torch.testing.assert_close(found, dense_penalty(weight_of(layer), rank), atol=1e-9, rtol=1e-12)


@pytest.mark.parametrize("ranks", [(4, 2), (4, 3, 2, 1)])
def test_a_tucker_layer_adds_the_spread_of_every_mode(ranks: tuple[int, ...]):
    """In any gauge, and with true gradients; autocast changes nothing."""
    layer: Any = LowRankTuckerConv2d(5, 7, 3, ranks=ranks, rank_multiple=3).double()
    with torch.no_grad():
        for part, p in enumerate(q for q in layer.parameters() if q.dim() > 1):
            p += 0.1 * draw(*p.shape, seed=part) * (p != 0)
    W = layer.to_dense().weight.detach().requires_grad_()
    expected = sum(dense_penalty(W.movedim(mode, 0).flatten(1), rank) for mode, rank in enumerate(ranks))
    assert isinstance(expected, Tensor)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = condition_penalty(layer)
    torch.testing.assert_close(found, expected, atol=1e-10, rtol=1e-10)
    found.backward()
    (G,) = torch.autograd.grad(expected, W)
    own = [p for p in layer.parameters() if p.dim() > 1]
    chained = torch.autograd.grad((layer.weight.as_subclass(Tensor) * G).sum(), own)
    for p, wanted in zip(own, chained, strict=True):
        torch.testing.assert_close(p.grad, wanted, atol=1e-9, rtol=1e-9)


@pytest.mark.parametrize(("m", "n", "rank"), SIZES)
def test_the_gradients_of_the_factors_are_those_of_the_dense_weight(m: int, n: int, rank: int):
    layer = random_layer(m, n, rank)
    W = weight_of(layer).requires_grad_()
    dense_penalty(W, rank).backward()
    condition_penalty(layer).backward()
    point, gradient = layer.point(), layer.point_gradient()
    assert isinstance(point, FactorPair) and isinstance(gradient, FactorPair) and W.grad is not None
    scale = float(W.grad.norm()) + 1
    torch.testing.assert_close(gradient.A, point.B @ W.grad.mT, atol=1e-12 * scale, rtol=1e-10)
    torch.testing.assert_close(gradient.B, point.A @ W.grad, atol=1e-12 * scale, rtol=1e-10)


@pytest.mark.parametrize(("m", "n", "rank"), SIZES)
def test_the_gradient_of_the_core_is_that_of_the_dense_weight(m: int, n: int, rank: int):
    layer = random_layer(m, n, rank, form="core")
    W = weight_of(layer).requires_grad_()
    dense_penalty(W, rank).backward()
    condition_penalty(layer).backward()
    point, gradient = layer.point(), layer.point_gradient()
    assert isinstance(point, LowRankFactors) and isinstance(gradient, Tensor) and W.grad is not None
    torch.testing.assert_close(gradient, point.U.mT @ W.grad @ point.V, atol=1e-9, rtol=1e-10)


def test_the_gauge_does_not_matter():
    layer, turned = random_layer(7, 5, 3), random_layer(7, 5, 3)
    C = draw(3, 3, seed=4)
    point = layer.point()
    assert isinstance(point, FactorPair)
    turned.set_factors(FactorPair(C.mT @ point.A, torch.linalg.solve(C, point.B)))
    torch.testing.assert_close(condition_penalty(turned), condition_penalty(layer), rtol=1e-10, atol=0)


def test_spare_rows_do_not_count_and_stay_at_rest():
    exact, spare = random_layer(9, 8, 3), random_layer(9, 8, 3, rank_multiple=8)
    assert spare.capacity == 8
    torch.testing.assert_close(condition_penalty(spare), condition_penalty(exact), rtol=1e-12, atol=0)
    condition_penalty(spare).backward()
    assert spare.A is not None and spare.A.grad is not None and not spare.A.grad[3:].any()


def test_layers_add_up_and_everything_else_is_left_alone():
    model = nn.Sequential(random_layer(7, 5, 3), nn.Linear(7, 6), LowRankConv2d(2, 6, 3, rank=2)).double()
    total = condition_penalty(model)
    assert isinstance(model[0], AbstractLowRankLayer) and isinstance(model[2], AbstractLowRankLayer)
    parts = [dense_penalty(weight_of(model[0]), 3), dense_penalty(weight_of(model[2]), 2)]
    torch.testing.assert_close(total, parts[0] + parts[1], rtol=1e-12, atol=1e-12)
    total.backward()
    assert model[1].weight.grad is None and model[2].bias.grad is None


@pytest.mark.parametrize("sigma", [[2.0, 2.0, 2.0], [3.0]])
def test_equal_singular_values_cost_nothing(sigma: list[float]):
    layer = LowRankLinear(5, 7, rank=len(sigma)).double()
    U, V = (torch.linalg.qr(draw(size, len(sigma), seed=size))[0] for size in (7, 5))
    layer.set_factors(from_dense(U @ torch.diag(torch.tensor(sigma).double()) @ V.mT, rank=len(sigma)), form="pair")
    penalty = condition_penalty(layer)
    penalty.backward()
    assert penalty.item() < 1e-25 and layer.A is not None and layer.A.grad is not None
    assert float(layer.A.grad.abs().max()) < 1e-12


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_summed_in_float32(dtype: torch.dtype):
    layer = random_layer(7, 5, 3).to(dtype)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = condition_penalty(layer)
    point = layer.point()
    assert isinstance(point, FactorPair) and found.dtype == torch.float32
    W = point.A.double().mT @ point.B.double()
    torch.testing.assert_close(found.double(), dense_penalty(W, 3), rtol=1e-4, atol=0)


@pytest.mark.parametrize("integrator", ["tangent_muon", "tangent_heavy_ball", "plain_factors"])
def test_training_with_it_lowers_the_condition_number(integrator: str):
    def condition_after(beta: float) -> float:
        layer = random_layer(7, 5, 3)
        optimizer = LowRankOptimizer(layer, lr=0.01, integrator=integrator, rank_policy=Fixed())
        target, x = weight_of(random_layer(7, 5, 3)), draw(64, 5, seed=8)
        for _ in range(200):
            optimizer.zero_grad()
            loss = nn.functional.mse_loss(layer(x), x @ target.mT) + beta * condition_penalty(layer)
            loss.backward()
            optimizer.step()
        sigma = diagonalise(layer.factors()).sigma
        return float(sigma[0] / sigma[-1])

    assert condition_after(0.01) < 0.7 * condition_after(0.0)


def test_a_model_without_low_rank_layers_is_refused():
    with pytest.raises(
        ValueError, match=r"condition_penalty found no low-rank layer .* Call factorize_\(model\) first"
    ):
        condition_penalty(nn.Linear(3, 2))
