"""Spectron is its published rule on the two factors, and changes the weight by no more than its learning rate."""

import pytest
import torch
from torch import Tensor

from dynarank import factors, linalg
from dynarank.factors import FactorPair
from dynarank.integrators.spectron import Spectron, power_step

SIZES = [(7, 5, 1), (5, 7, 1), (7, 5, 3), (5, 7, 3), (7, 5, 5), (5, 7, 5)]


def draw(*shape: int, seed: int = 11) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def assert_near(found: Tensor, expected: Tensor, atol: float = 1e-12) -> None:
    torch.testing.assert_close(found, expected, atol=atol, rtol=0)


def spectral_norm(matrix: Tensor) -> float:
    return float(torch.linalg.matrix_norm(matrix, 2))


@pytest.mark.parametrize(("m", "n", "rank"), SIZES)
def test_steps_are_those_of_the_published_rule(gradient_of, m, n, rank):
    point, target, lr, beta = FactorPair(draw(rank, m), draw(rank, n, seed=12)), draw(m, n, seed=13), 0.02, 0.9
    A, B = point.A.mT.clone(), point.B.mT.clone()  # W = A B^T with A (m, r), as in the paper
    moments, vectors = [torch.zeros_like(A), torch.zeros_like(B)], [None, None]
    method = Spectron()
    state = method.init(point)
    for _ in range(30):
        slope = gradient_of(point, point.to_dense() - target)
        point, state = method.advance(point, slope, state, lr=lr, momentum=beta, trusted=True)
        G, norms = A @ B.mT - target, []
        moments = [(1 - beta) * g + beta * old for g, old in zip((G @ B, G.mT @ A), moments, strict=True)]
        for i, factor in enumerate((A, B)):
            x = factor[:, factor.norm(dim=0).argmax()] if vectors[i] is None else vectors[i]
            y = factor.mT @ x
            z = factor @ (y / y.norm())
            norms.append(z.norm())
            vectors[i] = z / z.norm()
        rho = lr / (norms[0] + norms[1] + 1)
        A, B = (factor - rho * linalg.newton_schulz(moment) for factor, moment in zip((A, B), moments, strict=True))
    assert_near(point.A, A.mT, atol=1e-10)
    assert_near(point.B, B.mT, atol=1e-10)


@pytest.mark.parametrize(("m", "n", "rank"), SIZES)
def test_a_step_changes_the_weight_by_at_most_lr(make_pair, gradient_of, m, n, rank):
    pair, lr = make_pair(m, n, rank), 0.1
    for scale in (1e-3, 1.0, 1e3):
        point = FactorPair(scale * pair.A, scale * pair.B)
        new, _ = Spectron().advance(
            point, gradient_of(point, draw(m, n)), Spectron().init(point), lr=lr, momentum=0.9, trusted=True
        )
        assert spectral_norm(new.to_dense() - point.to_dense()) < 1.25 * lr  # 1.2 is what the iteration may give


def test_the_norm_is_exact_at_once_in_the_balanced_gauge(make_pair):
    for factor in vars(make_pair(7, 5, 3)).values():
        norm, vector = power_step(factor, torch.zeros(factor.shape[-1], dtype=torch.float64))
        assert float(norm) == pytest.approx(spectral_norm(factor), abs=1e-12)
        assert_near(vector.norm(), torch.tensor(1.0, dtype=torch.float64))


def test_the_norm_is_never_above_and_is_reached_by_warm_steps():
    factor, vector, norms = draw(4, 9), torch.zeros(9, dtype=torch.float64), []
    for _ in range(60):
        norm, vector = power_step(factor, vector)
        norms.append(float(norm))
    assert norms == sorted(norms) or max(norms) - norms[-1] < 1e-12
    assert norms[-1] == pytest.approx(spectral_norm(factor), abs=1e-8)
    assert norms[0] < spectral_norm(factor)


def test_a_factor_of_zeros_has_norm_zero_and_trains(gradient_of):
    point = FactorPair(draw(2, 7), torch.zeros(2, 5, dtype=torch.float64))
    slope = gradient_of(point, draw(7, 5, seed=12))
    new, state = Spectron().advance(point, slope, Spectron().init(point), lr=0.1, momentum=0.9, trusted=True)
    assert torch.equal(new.A, point.A) and bool(new.B.any())
    assert all(bool(torch.isfinite(value).all()) for value in state.values())


def test_a_rotated_gauge_takes_the_same_steps(make_pair, gradient_of):
    here, method = make_pair(7, 5, 3), Spectron()
    state = method.init(here)
    for seed in range(5):
        here, state = method.advance(
            here, gradient_of(here, draw(7, 5, seed=seed)), state, lr=0.1, momentum=0.9, trusted=True
        )
    Q = torch.linalg.qr(draw(3, 3))[0]
    there = FactorPair(Q @ here.A, Q @ here.B)
    carried = method.transport(state, here, there)
    ends = [
        method.advance(p, gradient_of(p, draw(7, 5)), s, lr=0.1, momentum=0.9, trusted=True)[0].to_dense()
        for p, s in ((here, state), (there, carried))
    ]
    assert_near(ends[1], ends[0])


def test_steps_take_batches(make_pair, gradient_of):
    pairs, G = [make_pair(7, 5, 3), factors.scaled(make_pair(7, 5, 3), 2.0)], draw(2, 7, 5)
    both = FactorPair(*(torch.stack([getattr(p, name) for p in pairs]) for name in "AB"))
    method = Spectron()
    new, _ = method.advance(both, gradient_of(both, G), method.init(both), lr=0.1, momentum=0.9, trusted=True)
    for i, pair in enumerate(pairs):
        alone, _ = method.advance(pair, gradient_of(pair, G[i]), method.init(pair), lr=0.1, momentum=0.9, trusted=True)
        assert_near(new.to_dense()[i], alone.to_dense())


def test_the_core_form_is_refused(make_pair):
    core = factors.read_balanced(make_pair(7, 5, 2))
    with pytest.raises(TypeError, match="Spectron needs a layer in the pair form"):
        Spectron().init(core)
