"""A cycle of augmented BUG, step by step against dense matrices."""

from typing import Any

import pytest
import torch
from torch import Tensor

from dynarank import factors
from dynarank.factors import FactorPair, LowRankFactors
from dynarank.integrators.augmented_bug import AugmentedBUG
from dynarank.layers.linear import LowRankLinear

SIZES = [(7, 5, 1), (5, 7, 1), (7, 5, 2), (5, 7, 3), (7, 5, 4), (5, 7, 5), (6, 6, 6)]
LR = 0.1


def draw(*shape: int, seed: int = 5) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def cycle(pair: FactorPair, target: Tensor, gradient_of: Any, steps: int) -> list[Any]:
    """Return the points of one cycle with ``steps`` coefficient steps on a quadratic loss."""
    integrator, points, state = AugmentedBUG(coefficient_steps=steps), [pair], AugmentedBUG().init(pair)
    for _ in range(1 + steps):
        slope = gradient_of(points[-1], points[-1].to_dense() - target)
        point, state = integrator.advance(points[-1], slope, state, lr=LR, momentum=0.9, trusted=True)
        points.append(point)
    assert state == {}
    return points


@pytest.mark.parametrize(("m", "n", "rank"), SIZES)
def test_the_basis_step_is_the_whole_riemannian_step(make_pair, gradient_of, project, m, n, rank):
    pair, target = make_pair(m, n, rank), draw(m, n)
    grown = cycle(pair, target, gradient_of, 3)[1]
    W = pair.to_dense()
    expected = W - LR * project(W, rank, W - target)
    torch.testing.assert_close(grown.to_dense(), expected, atol=1e-12, rtol=0)
    assert isinstance(grown, LowRankFactors)
    assert grown.S.shape == (rank + min(rank, m - rank), rank + min(rank, n - rank))
    for basis in (grown.U, grown.V):
        eye = torch.eye(basis.shape[1], dtype=torch.float64)
        torch.testing.assert_close(basis.mT @ basis, eye, atol=1e-13, rtol=0)


@pytest.mark.parametrize(("m", "n", "rank"), SIZES)
def test_the_bases_hold_the_old_ones_and_the_gradient(make_pair, gradient_of, m, n, rank):
    pair, target = make_pair(m, n, rank), draw(m, n)
    grown, at = cycle(pair, target, gradient_of, 1)[1], factors.read_balanced(pair)
    G = pair.to_dense() - target
    for basis, inside in ((grown.U, [at.U, G @ at.V]), (grown.V, [at.V, G.mT @ at.U])):
        columns = torch.cat(inside, -1)
        torch.testing.assert_close(basis @ (basis.mT @ columns), columns, atol=1e-12, rtol=0)


@pytest.mark.parametrize(("m", "n", "rank"), SIZES)
def test_a_cycle_is_its_dense_twin(make_pair, gradient_of, project, bases_of, m, n, rank):
    pair, target = make_pair(m, n, rank), draw(m, n)
    points = cycle(pair, target, gradient_of, 4)
    W = pair.to_dense()
    U, V = points[1].U, points[1].V
    W = W - LR * project(W, rank, W - target)
    for point in points[2:5]:
        assert point.U is U and point.V is V  # coefficient steps move only S
        W = W - LR * U @ (U.mT @ (W - target) @ V) @ V.mT
        torch.testing.assert_close(point.to_dense(), W, atol=1e-12, rtol=0)
    W = W - LR * U @ (U.mT @ (W - target) @ V) @ V.mT
    left, right = bases_of(W, rank)
    assert isinstance(points[5], FactorPair) and points[5].rank == rank
    torch.testing.assert_close(points[5].to_dense(), left @ left.mT @ W @ right @ right.mT, atol=1e-10, rtol=0)


@pytest.mark.parametrize("steps", [1, 2, 9])
def test_a_cycle_has_one_basis_step_and_the_coefficient_steps(make_pair, gradient_of, steps):
    points = cycle(make_pair(7, 5, 2), draw(7, 5), gradient_of, steps)
    assert [isinstance(point, FactorPair) for point in points] == [True, *[False] * steps, True]


def test_new_directions_grow_in_first_order_within_a_cycle(make_pair, gradient_of):
    pair = make_pair(7, 5, 2)
    target = pair.to_dense() + draw(7, 5)
    last = factors.diagonalise(cycle(pair, target, gradient_of, 9)[-2])
    assert float(last.sigma[2]) > 0.1 * LR  # what a rank event within the cycle sees; O(lr^2) without these steps


def test_a_layer_in_the_core_form_has_the_gradient_that_the_step_needs(make_pair, gradient_of):
    pair = make_pair(7, 5, 2)
    layer = LowRankLinear(5, 7, bias=False, rank=2, dtype=torch.float64)
    layer.set_factors(cycle(pair, draw(7, 5), gradient_of, 2)[1])
    x, y = draw(9, 5), draw(9, 7, seed=6)
    (layer(x) - y).square().sum().backward()
    G = 2 * (x @ layer.to_dense().weight.mT - y).mT @ x
    torch.testing.assert_close(layer.point_gradient(), layer.U.mT @ G @ layer.V)


@pytest.mark.parametrize("steps", [0, -3])
def test_a_cycle_without_coefficient_steps_is_refused(steps):
    with pytest.raises(ValueError, match=f"AugmentedBUG: coefficient_steps must be at least 1, got {steps}"):
        AugmentedBUG(coefficient_steps=steps)
