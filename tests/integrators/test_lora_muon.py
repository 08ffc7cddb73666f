"""LoRA-Muon against dense matrices, and against its rule on the factors in a gauge of any kind."""

import pytest
import torch
from torch import Tensor

from dynarank import factors, linalg
from dynarank.factors import FactorPair, LowRankFactors
from dynarank.integrators.lora_muon import LoRAMuon

SIZES = [(7, 5, 1), (5, 7, 1), (7, 5, 3), (5, 7, 3), (7, 5, 5), (5, 7, 5)]


def draw(*shape: int, seed: int = 11) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def assert_near(found: Tensor, expected: Tensor, atol: float = 1e-12) -> None:
    torch.testing.assert_close(found, expected, atol=atol, rtol=0)


def spectral_norm(matrix: Tensor) -> float:
    return float(torch.linalg.matrix_norm(matrix, 2))


def power(matrix: Tensor, exponent: float) -> Tensor:
    """A power of a symmetric positive matrix."""
    values, vectors = torch.linalg.eigh(matrix)
    return vectors @ torch.diag(values**exponent) @ vectors.mT


@pytest.mark.parametrize(("m", "n", "rank"), SIZES)
@pytest.mark.parametrize("steps", [1, 30])
def test_steps_are_those_of_dense_matrices(make_pair, gradient_of, m, n, rank, steps):
    point, target, lr, beta = make_pair(m, n, rank), draw(m, n), 0.02, 0.9
    method, h = LoRAMuon(), 0.5 * lr * (m / n) ** 0.5
    state = method.init(point)
    W, average = point.to_dense(), (0, 0)
    for _ in range(steps):
        slope = gradient_of(point, point.to_dense() - target)
        point, state = method.advance(point, slope, state, lr=lr, momentum=beta, trusted=True)
        U, sigma, Vh = (part[..., :rank] if part.dim() == 1 else part for part in torch.linalg.svd(W))
        U, V, G = U[:, :rank], Vh.mT[:, :rank], W - target
        # Averages of G V V^T and U U^T G: m x n matrices, projected on each new basis.
        average = ((G + beta * average[0]) @ V @ V.mT, U @ U.mT @ (G + beta * average[1]))
        damped = sigma + h
        weight = (sigma / damped).sqrt()
        A = U * sigma.sqrt() - h * linalg.newton_schulz(average[0] @ V * weight) / damped.sqrt()
        B = V * sigma.sqrt() - h * linalg.newton_schulz(average[1].mT @ U * weight) / damped.sqrt()
        W = A @ B.mT
    assert_near(point.to_dense(), W, atol=1e-10)


@pytest.mark.parametrize(("m", "n", "rank"), SIZES)
def test_a_step_is_steepest_descent_on_the_factors_in_any_gauge(make_pair, gradient_of, m, n, rank):
    balanced, lr = make_pair(m, n, rank), 0.1
    gauge = torch.diag(torch.logspace(-0.5, 0.5, rank, dtype=torch.float64)) @ torch.linalg.qr(draw(rank, rank))[0]
    pair = FactorPair(gauge.mT @ balanced.A, torch.linalg.solve(gauge, balanced.B))
    slope = gradient_of(pair, draw(m, n))
    new, _ = LoRAMuon().advance(pair, slope, LoRAMuon().init(pair), lr=lr, momentum=0.9, trusted=False)
    h = 0.5 * lr * (m / n) ** 0.5
    moved = []
    for factor, other, g in ((pair.A, pair.B, slope.A), (pair.B, pair.A, slope.B)):
        C, D = other @ other.mT, factor @ factor.mT
        half = power(D, 0.5)
        mean = power(D, -0.5) @ power(half @ C @ half, 0.5) @ power(D, -0.5)  # C # D^-1: mean D mean = C
        L = torch.linalg.cholesky(C + h * mean)
        step = torch.linalg.solve(L.mT, linalg.newton_schulz(torch.linalg.solve(L, g)))
        moved.append(factor - h * step)
    assert_near(new.to_dense(), moved[0].mT @ moved[1], atol=1e-11)


def test_the_weight_moves_by_about_lr(make_pair, gradient_of):
    pair, lr = make_pair(7, 5, 3), 1e-3
    for size in (1e-20, 1.0, 1e20):
        slope = gradient_of(pair, size * draw(7, 5))
        new, _ = LoRAMuon().advance(pair, slope, LoRAMuon().init(pair), lr=lr, momentum=0.9, trusted=True)
        moved = spectral_norm(new.to_dense() - pair.to_dense())
        assert 0.5 * lr * (7 / 5) ** 0.5 < moved < 1.3 * lr * (7 / 5) ** 0.5


def test_a_new_direction_grows_within_a_few_bounded_steps(make_pair, gradient_of):
    at, lr = factors.read_balanced(make_pair(7, 5, 3)), 0.05
    point = factors.to_pair(LowRankFactors(at.U, at.S * torch.tensor([1.0, 1.0, 0.0]).double(), at.V))
    assert float(factors.read_balanced(point).sigma[2]) < 1e-7
    state = LoRAMuon().init(point)
    for _ in range(4):
        slope, before = gradient_of(point, -at.to_dense()), point.to_dense()
        point, state = LoRAMuon().advance(point, slope, state, lr=lr, momentum=0.9, trusted=True)
        assert spectral_norm(point.to_dense() - before) < 1.5 * lr * (7 / 5) ** 0.5
    assert float(factors.read_balanced(point).sigma[2]) > lr


@pytest.mark.parametrize("rank", [1, 2, 4])
def test_momenta_are_projected_on_new_bases(make_pair, rank):
    here, there = make_pair(7, 5, 3), make_pair(7, 5, rank)
    G, other = draw(7, 5), draw(7, 5, seed=12)
    old, new = factors.read_balanced(here), factors.read_balanced(there)
    carried = LoRAMuon().transport({"K": G @ old.V, "L": other.mT @ old.U}, here, there)
    assert_near(carried["K"] @ new.V.mT, G @ old.V @ old.V.mT @ new.V @ new.V.mT)
    assert_near(new.U @ carried["L"].mT, new.U @ new.U.mT @ old.U @ old.U.mT @ other)


def test_directions_are_the_leading_ones_outside_the_bases(make_pair, bases_of):
    here, G = make_pair(7, 5, 2), draw(7, 5)
    at = factors.read_balanced(here)
    left, right = LoRAMuon().directions({"K": G @ at.V, "L": G.mT @ at.U}, here)
    K, L = G @ at.V - at.U @ at.U.mT @ G @ at.V, G.mT @ at.U - at.V @ at.V.mT @ G.mT @ at.U
    for ways, columns in ((left, K), (right, L)):
        assert_near((bases_of(columns, 1)[0].mT @ ways[:, :1]).abs(), torch.ones(1, 1, dtype=torch.float64))


def test_steps_take_batches(make_pair, gradient_of):
    pairs, G = [make_pair(7, 5, 3), factors.scaled(make_pair(7, 5, 3), 2.0)], draw(2, 7, 5)
    both = FactorPair(*(torch.stack([getattr(p, name) for p in pairs]) for name in "AB"))
    method = LoRAMuon()
    new, _ = method.advance(both, gradient_of(both, G), method.init(both), lr=0.1, momentum=0.9, trusted=True)
    for i, pair in enumerate(pairs):
        slope = gradient_of(pair, G[i])
        alone, _ = method.advance(pair, slope, method.init(pair), lr=0.1, momentum=0.9, trusted=True)
        assert_near(new.to_dense()[i], alone.to_dense())
