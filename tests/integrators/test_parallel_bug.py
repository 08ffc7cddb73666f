"""Parallel BUG with explicit Euler is the Riemannian step with the truncated SVD, computed densely here."""

import pytest
import torch

from dynarank.factors import read_balanced
from dynarank.integrators.parallel_bug import ParallelBUG

SIZES = [(7, 5, 1), (5, 7, 1), (7, 5, 2), (5, 7, 3), (7, 5, 4), (5, 7, 5), (6, 6, 6)]


@pytest.mark.parametrize(("m", "n", "rank"), SIZES)
@pytest.mark.parametrize("lr", [0.05, 1.0])
def test_steps_are_the_truncated_riemannian_steps(make_pair, gradient_of, project, bases_of, m, n, rank, lr):
    point, target = make_pair(m, n, rank), torch.randn(m, n, dtype=torch.float64)
    W = point.to_dense()
    for _ in range(20):
        slope = gradient_of(point, point.to_dense() - target)
        point, _ = ParallelBUG().advance(point, slope, {}, lr=lr, momentum=0.9, trusted=True)
        Y = W - lr * project(W, rank, W - target)
        U, V = bases_of(Y, rank)
        W = U @ U.mT @ Y @ V @ V.mT
    torch.testing.assert_close(point.to_dense(), W, atol=1e-10, rtol=0)


def test_a_stationary_point_is_the_truncated_target(make_pair, gradient_of, bases_of):
    point, target = make_pair(7, 5, 2), torch.randn(7, 5, dtype=torch.float64)
    for _ in range(400):
        slope = gradient_of(point, point.to_dense() - target)
        point, _ = ParallelBUG().advance(point, slope, {}, lr=0.5, momentum=0.0, trusted=True)
    U, V = bases_of(target, 2)
    torch.testing.assert_close(point.to_dense(), U @ U.mT @ target @ V @ V.mT, atol=1e-8, rtol=0)


def test_a_core_form_is_refused(make_pair):
    core, slope = read_balanced(make_pair(7, 5, 2)), torch.zeros(2, 2, dtype=torch.float64)
    with pytest.raises(TypeError, match="needs a layer in the pair form"):
        ParallelBUG().advance(core, slope, {}, lr=0.1, momentum=0.0, trusted=True)
