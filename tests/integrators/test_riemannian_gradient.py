"""Riemannian gradient descent is the truncated step of dense matrices, and parallel BUG where it has no momentum."""

import pytest
import torch
from torch import Tensor

from dynarank.integrators.parallel_bug import ParallelBUG
from dynarank.integrators.riemannian_gradient import RiemannianGradient

SIZES = [(7, 5, 1), (5, 7, 1), (7, 5, 3), (5, 7, 3), (7, 5, 5), (5, 7, 5)]


def draw(*shape: int, seed: int = 11) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def assert_near(found: Tensor, expected: Tensor, atol: float = 1e-12) -> None:
    torch.testing.assert_close(found, expected, atol=atol, rtol=0)


def best(Y: Tensor, rank: int, bases_of) -> Tensor:
    """The best approximation of a rank, dense."""
    U, V = bases_of(Y, rank)
    return U @ U.mT @ Y @ V @ V.mT


@pytest.mark.parametrize(("m", "n", "rank"), SIZES)
def test_a_step_is_the_truncated_projected_gradient_step(make_pair, gradient_of, project, bases_of, m, n, rank):
    pair, G, lr = make_pair(m, n, rank), draw(m, n), 0.3
    method = RiemannianGradient()
    new, _ = method.advance(pair, gradient_of(pair, G), method.init(pair), lr=lr, momentum=0.0, trusted=True)
    W = pair.to_dense()
    assert_near(new.to_dense(), best(W - lr * project(W, rank, G), rank, bases_of))


@pytest.mark.parametrize(("m", "n", "rank"), SIZES)
def test_without_momentum_it_is_parallel_bug(make_pair, gradient_of, m, n, rank):
    target, ends = draw(m, n), []
    for method in (RiemannianGradient(), ParallelBUG()):
        point = make_pair(m, n, rank)
        state = method.init(point)
        for _ in range(20):
            slope = gradient_of(point, point.to_dense() - target)
            point, state = method.advance(point, slope, state, lr=0.2, momentum=0.0, trusted=True)
        ends.append(point.to_dense())
    assert_near(ends[0], ends[1])


@pytest.mark.parametrize(("m", "n", "rank"), SIZES)
def test_momentum_is_projected_on_each_new_tangent_space(make_pair, gradient_of, project, bases_of, m, n, rank):
    point, target, lr, beta = make_pair(m, n, rank), draw(m, n), 0.05, 0.9
    method = RiemannianGradient()
    state = method.init(point)
    W, momentum = point.to_dense(), torch.zeros(m, n, dtype=torch.float64)
    for _ in range(50):
        slope = gradient_of(point, point.to_dense() - target)
        point, state = method.advance(point, slope, state, lr=lr, momentum=beta, trusted=True)
        g = project(W, rank, W - target)
        momentum = g + beta * momentum
        W = best(W - lr * (g + beta * momentum), rank, bases_of)
        momentum = project(W, rank, momentum)
    assert_near(point.to_dense(), W, atol=1e-10)
