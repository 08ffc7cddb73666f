"""Laws of tangent vectors, retractions and the tangent integrators, against dense matrices."""

from typing import Any

import pytest
import torch
from torch import Tensor

from dynarank import factors, linalg
from dynarank.factors import FactorPair, LowRankFactors
from dynarank.integrators import _tangent
from dynarank.integrators._tangent import (
    TangentVector,
    augmented,
    project_gradient,
    retract_qr,
    retract_svd,
    transport,
)
from dynarank.integrators.parallel_bug import ParallelBUG
from dynarank.integrators.tangent_heavy_ball import TangentHeavyBall
from dynarank.integrators.tangent_muon import TangentMuon

SIZES = [(7, 5, 1), (5, 7, 2), (7, 5, 4), (5, 7, 5), (6, 6, 6)]


def draw(*shape: int, seed: int = 5) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def dense(vector: TangentVector, at: LowRankFactors) -> Tensor:
    """The tangent vector as a matrix: ``U S V^T + Up V^T + U Vp^T``."""
    return at.U @ vector.S @ at.V.mT + vector.Up @ at.V.mT + at.U @ vector.Vp.mT


def assert_near(found: Tensor, expected: Tensor, atol: float = 1e-12) -> None:
    torch.testing.assert_close(found, expected, atol=atol, rtol=0)


@pytest.fixture(autouse=True, params=[1, _tangent.LARGE], ids=["by Gram matrices", "by Householder"])
def large(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Orthonormalise as large matrices are, and as small ones."""
    monkeypatch.setattr(_tangent, "LARGE", request.param)


@pytest.fixture(params=SIZES, ids=lambda size: "{}x{} rank {}".format(*size))
def at(request: pytest.FixtureRequest, make_pair: Any) -> LowRankFactors:
    return factors.read_balanced(make_pair(*request.param))


def tangent_at(at: LowRankFactors, seed: int = 5) -> tuple[TangentVector, Tensor]:
    """A random tangent vector in coordinates, and the dense matrix whose projection it is."""
    Z = draw(*at.shape, seed=seed)
    return project_gradient(at, factors.TangentGradient(Z @ at.V, Z.mT @ at.U, at.U.mT @ Z @ at.V)), Z


# --- tangent vectors ---------------------------------------------------------------------------------------------


def test_projected_gradient_is_the_dense_projection(at, project):
    vector, Z = tangent_at(at)
    assert_near(dense(vector, at), project(at.to_dense(), at.rank, Z))
    assert_near(at.U.mT @ vector.Up, torch.zeros_like(at.S))
    assert_near(at.V.mT @ vector.Vp, torch.zeros_like(at.S))


def test_sums_and_multiples_are_those_of_matrices(at):
    (one, _), (other, _) = tangent_at(at), tangent_at(at, seed=6)
    assert_near(dense(one.plus(other, times=-0.3), at), dense(one, at) - 0.3 * dense(other, at))
    assert_near(dense(one.scaled(0.7), at), 0.7 * dense(one, at))


@pytest.mark.parametrize("rank", [1, 3, 5])
def test_transport_is_the_projection_on_the_new_tangent_space(at, project, rank):
    vector, _ = tangent_at(at)
    new = factors.from_dense(at.to_dense() + 0.3 * draw(*at.shape, seed=7), rank=rank)
    carried = transport(vector, at, new)
    assert_near(dense(carried, new), project(new.to_dense(), rank, dense(vector, at)))
    assert_near(new.U.mT @ carried.Up, torch.zeros_like(new.S))
    assert_near(new.V.mT @ carried.Vp, torch.zeros_like(new.S))


def test_augmented_bases_hold_the_step_exactly(at):
    vector, _ = tangent_at(at)
    grown, (m, n), r = augmented(at, vector), at.shape, at.rank
    assert_near(grown.to_dense(), at.to_dense() - dense(vector, at))
    assert grown.S.shape == (r + min(r, m - r), r + min(r, n - r))
    for basis in (grown.U, grown.V):
        assert_near(basis.mT @ basis, torch.eye(basis.shape[1], dtype=torch.float64))


def test_the_svd_retraction_is_the_best_approximation(at):
    vector, _ = tangent_at(at)
    Y = at.to_dense() - dense(vector, at)
    assert_near(retract_svd(at, vector).to_dense(), factors.from_dense(Y, rank=at.rank).to_dense())


def test_the_qr_retraction_projects_on_the_bases_of_k_and_l(at):
    vector, _ = tangent_at(at)
    Y = at.to_dense() - dense(vector, at)
    U1, V1 = torch.linalg.qr(Y @ at.V)[0], torch.linalg.qr(Y.mT @ at.U)[0]
    assert_near(retract_qr(at, vector).to_dense(), U1 @ U1.mT @ Y @ V1 @ V1.mT)


def test_both_retractions_agree_to_second_order(at):
    vector, _ = tangent_at(at)
    gaps = []
    for h in (1e-3, 5e-4):
        one, other = retract_qr(at, vector.scaled(h)), retract_svd(at, vector.scaled(h))
        gaps.append(float((one.to_dense() - other.to_dense()).norm()))
    assert gaps[1] < 1e-13 if at.rank == min(at.shape) else gaps[0] > 3.5 * gaps[1]


def test_tangent_vectors_and_retractions_take_batches(make_pair):
    pairs = [make_pair(7, 5, 3), factors.scaled(make_pair(7, 5, 3), 2.0)]
    at = factors.read_balanced(FactorPair(*(torch.stack([getattr(p, name) for p in pairs]) for name in "AB")))
    Z = draw(2, 7, 5)
    vector = project_gradient(at, factors.TangentGradient(Z @ at.V, Z.mT @ at.U, at.U.mT @ Z @ at.V))
    assert_near(augmented(at, vector).to_dense(), at.to_dense() - dense(vector, at))
    for retract in (retract_qr, retract_svd):
        new = retract(at, vector)
        carried = transport(vector, at, new)
        for i, pair in enumerate(pairs):
            alone = factors.read_balanced(pair)
            part = TangentVector(vector.S[i], vector.Up[i], vector.Vp[i])
            single = retract(alone, part)
            assert_near(new.to_dense()[i], single.to_dense())
            here = LowRankFactors(new.U[i], new.S[i], new.V[i])
            there = TangentVector(carried.S[i], carried.Up[i], carried.Vp[i])
            assert_near(dense(there, here), dense(transport(part, alone, single), single))


# --- integrators -------------------------------------------------------------------------------------------------


def qr_step(W: Tensor, rank: int, D: Tensor, bases_of: Any) -> Tensor:
    """``W - D`` projected on the bases of ``(W - D) V`` and ``(W - D)^T U``, all dense."""
    U, V = bases_of(W, rank)
    U1, V1 = torch.linalg.qr((W - D) @ V)[0], torch.linalg.qr((W - D).mT @ U)[0]
    return U1 @ U1.mT @ (W - D) @ V1 @ V1.mT


@pytest.mark.parametrize(("m", "n", "rank"), SIZES)
@pytest.mark.parametrize("method", [TangentHeavyBall, TangentMuon])
def test_momentum_is_the_projected_momentum_of_dense_matrices(
    method, make_pair, gradient_of, project, bases_of, m, n, rank
):
    point, lr, beta = make_pair(m, n, rank), 0.05, 0.9
    integrator = method()
    state = integrator.init(point)
    W, momentum, target = point.to_dense(), torch.zeros(m, n, dtype=torch.float64), draw(m, n)
    for _ in range(50):
        slope = gradient_of(point, point.to_dense() - target)
        point, state = integrator.advance(point, slope, state, lr=lr, momentum=beta, trusted=True)
        g = project(W, rank, W - target)
        momentum = g + beta * momentum
        D = g + beta * momentum
        if method is TangentMuon:
            D = project(W, rank, linalg.newton_schulz(D)) * (m / n) ** 0.5
        W1 = qr_step(W, rank, lr * D, bases_of)
        momentum, W = project(W1, rank, momentum), W1
    assert_near(point.to_dense(), W, atol=1e-10)


@pytest.mark.parametrize(("m", "n", "rank"), SIZES)
def test_heavy_ball_without_momentum_is_parallel_bug_to_second_order(make_pair, gradient_of, m, n, rank):
    pair = make_pair(m, n, rank)
    slope = gradient_of(pair, pair.to_dense() - draw(m, n))
    gaps = []
    for lr in (1e-3, 5e-4):
        one, other = (
            method().advance(pair, slope, method().init(pair), lr=lr, momentum=0.0, trusted=True)[0].to_dense()
            for method in (TangentHeavyBall, ParallelBUG)
        )
        gaps.append(float((one - other).norm()))
    assert gaps[1] < 1e-13 if rank == min(m, n) else gaps[0] > 3.5 * gaps[1]


def test_heavy_ball_at_full_rank_is_torch_sgd_with_nesterov(make_pair, gradient_of):
    point, target = make_pair(6, 6, 6), draw(6, 6)
    weight = torch.nn.Parameter(point.to_dense())
    sgd = torch.optim.SGD([weight], lr=0.03, momentum=0.9, nesterov=True)
    integrator = TangentHeavyBall()
    state = integrator.init(point)
    for _ in range(50):
        slope = gradient_of(point, point.to_dense() - target)
        point, state = integrator.advance(point, slope, state, lr=0.03, momentum=0.9, trusted=True)
        weight.grad = (weight - target).detach()
        sgd.step()
    assert_near(point.to_dense(), weight.detach(), atol=1e-8)


@pytest.mark.parametrize("size", [1e-20, 1.0, 1e20])
def test_a_muon_step_has_one_size_whatever_the_gradient(at, size):
    vector, _ = tangent_at(at)
    (m, n), direction = at.shape, TangentMuon().direction(vector.scaled(size), at)
    assert_near(dense(direction, at), dense(TangentMuon().direction(vector, at), at), atol=1e-9)
    norm = float(torch.linalg.matrix_norm(dense(direction, at), 2)) / (m / n) ** 0.5
    assert 0.6 < norm < 1.4


def test_a_muon_step_moves_the_weight_by_its_size(make_pair, gradient_of):
    pair, lr = make_pair(7, 5, 3), 1e-3
    slope = gradient_of(pair, draw(7, 5))
    new, _ = TangentMuon().advance(pair, slope, TangentMuon().init(pair), lr=lr, momentum=0.9, trusted=True)
    moved = float(torch.linalg.matrix_norm(new.to_dense() - pair.to_dense(), 2))
    assert 0.6 * lr * (7 / 5) ** 0.5 < moved < 1.4 * lr * (7 / 5) ** 0.5


def test_a_muon_direction_is_the_projected_polar_factor_of_the_same_momentum(at, project):
    vector, Z = tangent_at(at)
    (m, n), W = at.shape, at.to_dense()
    expected = project(W, at.rank, linalg.newton_schulz(project(W, at.rank, Z))) * (m / n) ** 0.5
    assert_near(dense(TangentMuon().direction(vector, at), at), expected, atol=1e-10)


@pytest.mark.parametrize("method", [TangentHeavyBall, TangentMuon])
@pytest.mark.parametrize("rank", [1, 2, 4])
def test_momentum_survives_a_rank_event_as_its_projection(method, make_pair, gradient_of, project, rank):
    here, G = make_pair(7, 5, 3), draw(7, 5)
    integrator = method()
    here, state = integrator.advance(
        here, gradient_of(here, G), integrator.init(here), lr=0.1, momentum=0.9, trusted=True
    )
    at = factors.read_balanced(here)
    momentum = dense(TangentVector(**state), at)
    left, right = integrator.directions(state, here)
    grown = factors.augment(
        factors.truncate(at, rank=rank),
        left=linalg.complement(at.U[:, :rank], left, 1),
        right=linalg.complement(at.V[:, :rank], right, 1),
    )
    there = factors.to_pair(grown)
    carried = TangentVector(**integrator.transport(state, here, there))
    new = factors.read_balanced(there)
    left, right = new.U @ new.U.mT, new.V @ new.V.mT
    assert_near(dense(carried, new), left @ momentum + (momentum - left @ momentum) @ right)


@pytest.mark.parametrize("method", [TangentHeavyBall, TangentMuon])
def test_directions_are_the_leading_ones_of_the_momentum_outside_the_bases(method, make_pair, gradient_of, bases_of):
    here, G = make_pair(7, 5, 2), draw(7, 5)
    state = method().advance(here, gradient_of(here, G), method().init(here), lr=0.1, momentum=0.9, trusted=True)[1]
    left, right = method().directions(state, here)
    for ways, residual in ((left, state["Up"]), (right, state["Vp"])):
        best = bases_of(residual, 1)[0]
        assert_near((best.mT @ ways[:, :1]).abs(), torch.ones(1, 1, dtype=torch.float64))
