"""Adam in the tangent space with second moments of rows and columns, against dense matrices."""

import pytest
import torch
from torch import Tensor

from dynarank import factors
from dynarank.factors import FactorPair
from dynarank.integrators._tangent import TangentVector
from dynarank.integrators.tangent_adam import TangentAdam
from dynarank.integrators.tangent_adam_elementwise import TangentAdamElementwise

SIZES = [(7, 5, 1), (5, 7, 1), (7, 5, 3), (5, 7, 3), (7, 5, 5), (5, 7, 5)]


def draw(*shape: int, seed: int = 11) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def assert_near(found: Tensor, expected: Tensor, atol: float = 1e-12) -> None:
    torch.testing.assert_close(found, expected, atol=atol, rtol=0)


def qr_step(W: Tensor, rank: int, D: Tensor, bases_of) -> Tensor:
    """``W - D`` projected on the bases of ``(W - D) V`` and ``(W - D)^T U``, all dense."""
    U, V = bases_of(W, rank)
    U1, V1 = torch.linalg.qr((W - D) @ V)[0], torch.linalg.qr((W - D).mT @ U)[0]
    return U1 @ U1.mT @ (W - D) @ V1 @ V1.mT


@pytest.mark.parametrize(("m", "n", "rank"), SIZES)
@pytest.mark.parametrize("steps", [1, 30])
def test_steps_are_those_of_dense_matrices(make_pair, gradient_of, project, bases_of, m, n, rank, steps):
    point, target, lr, beta, beta2, eps = make_pair(m, n, rank), draw(m, n), 0.02, 0.9, 0.95, 1e-3
    method = TangentAdam(beta2=beta2, eps=eps)
    state = method.init(point)
    W, momentum, rows, columns = point.to_dense(), torch.zeros(m, n).double(), 0, 0
    for t in range(1, steps + 1):
        slope = gradient_of(point, point.to_dense() - target)
        point, state = method.advance(point, slope, state, lr=lr, momentum=beta, trusted=True)
        g = project(W, rank, W - target)
        momentum = (1 - beta) * g + beta * momentum
        rows = (1 - beta2) * g.square().mean(1) + beta2 * rows
        columns = (1 - beta2) * g.square().mean(0) + beta2 * columns
        r, c = rows / (1 - beta2**t), columns / (1 - beta2**t)
        root = torch.outer(r.sqrt() + eps, c.sqrt() + eps) / (r.mean().sqrt() + eps)
        ahead = ((1 - beta) * g + beta * momentum) / (1 - beta ** (t + 1))
        W1 = qr_step(W, rank, lr * project(W, rank, ahead / root), bases_of)
        momentum, W = project(W1, rank, momentum), W1
    assert_near(point.to_dense(), W, atol=1e-10)


@pytest.mark.parametrize("size", [1e-4, 1.0, 1e4])
def test_a_first_step_moves_entries_by_about_lr_whatever_the_gradient(make_pair, gradient_of, size):
    pair, lr = make_pair(7, 5, 3), 1e-3
    method = TangentAdam(eps=1e-12)
    slope = gradient_of(pair, size * draw(7, 5))
    new, _ = method.advance(pair, slope, method.init(pair), lr=lr, momentum=0.9, trusted=True)
    moved = (new.to_dense() - pair.to_dense()).square().mean().sqrt()
    assert 0.7 * lr < float(moved) < 1.3 * lr


def test_second_moments_are_the_same_in_all_bases_and_ranks(make_pair, gradient_of):
    here, method = make_pair(7, 5, 3), TangentAdam()
    state = method.advance(here, gradient_of(here, draw(7, 5)), method.init(here), lr=0.1, momentum=0.9, trusted=True)[
        1
    ]
    at = factors.read_balanced(here)
    left, right = (torch.linalg.qr(torch.cat([b, draw(len(b), 1)], -1))[0][:, 3:] for b in (at.U, at.V))
    for there in (factors.truncate(at, rank=1), factors.augment(at, left=left, right=right)):
        carried = method.transport(state, here, factors.to_pair(there))
        for name in ("rows", "columns", "weight", "squares_weight"):
            assert torch.equal(carried[name], state[name])


def test_second_moments_are_never_negative(make_pair):
    at = factors.read_balanced(make_pair(7, 5, 3))
    for seed in range(50):
        tiny = 1e-9 * draw(5, 3, seed=seed)
        vector = TangentVector(torch.zeros(3, 3).double(), torch.zeros(7, 3).double(), tiny - at.V @ (at.V.mT @ tiny))
        assert all(bool((value >= 0).all()) for value in TangentAdam().squares(at, vector).values())


def test_steps_take_batches(make_pair, gradient_of):
    pairs = [make_pair(7, 5, 3), factors.scaled(make_pair(7, 5, 3), 2.0)]
    G = draw(2, 7, 5)
    both = FactorPair(*(torch.stack([getattr(p, name) for p in pairs]) for name in "AB"))
    for method in (TangentAdam(), TangentAdamElementwise()):
        new, _ = method.advance(both, gradient_of(both, G), method.init(both), lr=0.1, momentum=0.9, trusted=True)
        for i, pair in enumerate(pairs):
            slope = gradient_of(pair, G[i])
            alone, _ = method.advance(pair, slope, method.init(pair), lr=0.1, momentum=0.9, trusted=True)
            assert_near(new.to_dense()[i], alone.to_dense())


@pytest.mark.parametrize("method", [TangentAdam, TangentAdamElementwise])
@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"beta2": 1.0}, "beta2 must be at least 0 and below 1, got 1.0"),
        ({"beta2": -0.1}, "beta2 must be at least 0 and below 1, got -0.1"),
        ({"eps": 0.0}, "eps must be above 0, got 0.0"),
    ],
)
def test_wrong_options_are_refused(method, options, message):
    with pytest.raises(ValueError, match=f"{method.__name__}: {message}"):
        method(**options)
