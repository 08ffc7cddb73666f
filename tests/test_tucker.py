"""Points and tangent vectors of low multilinear rank, against plain dense computations in float64."""

import math
from collections.abc import Callable
from itertools import pairwise

import pytest
import torch
from torch import Tensor

from dynarank import linalg, tucker
from dynarank.factors import LowRankFactors
from dynarank.integrators._tangent import TangentVector, augmented
from dynarank.integrators.tangent_muon import TangentMuon
from dynarank.tucker import TuckerFactors, TuckerTangent

SHAPES = {
    "channels": ((7, 5, 3, 2), (3, 2, None, None)),
    "wide": ((4, 9, 2, 3), (2, 5, None, None)),
    "rank-one": ((5, 4, 3, 3), (1, 1, None, None)),
    "full": ((5, 4, 3, 3), (5, 4, None, None)),
    "one-mode": ((6, 5, 2, 2), (3, None, None, None)),
    "all-modes": ((5, 4, 3, 3), (3, 2, 2, 2)),
    "three-way": ((6, 5, 4), (2, 3, 2)),
}


@pytest.fixture(params=SHAPES.values(), ids=SHAPES.keys())
def case(request: pytest.FixtureRequest) -> tuple[tuple[int, ...], tucker.Ranks]:
    return request.param


def randn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def point_of(shape: tuple[int, ...], ranks: tucker.Ranks, seed: int = 0) -> TuckerFactors:
    return tucker.from_dense(randn(*shape, seed=seed), ranks=ranks)


def dense_of(at: TuckerFactors, vector: TuckerTangent) -> Tensor:
    """Return a tangent vector by its definition."""
    W = tucker.multiply(vector.core, at.bases)
    for mode, _ in at.modes():
        Q, _ = at.frames[mode]
        bases = list(at.bases)
        bases[mode] = vector.slopes[mode]
        W = W + tucker.multiply(tucker.fold(Q.mT, mode, at.core.shape), bases)
    return W


def projector(at: TuckerFactors) -> Tensor:
    """Return the dense orthogonal projector on the span of all derivatives of ``W`` with respect to core and bases."""
    given = [U for _, U in at.modes()]

    def weight(core: Tensor, *bases: Tensor) -> Tensor:
        left = iter(bases)
        return TuckerFactors(core, tuple(None if U is None else next(left) for U in at.bases)).to_dense().flatten()

    jacobians = torch.autograd.functional.jacobian(weight, (at.core, *given))
    U, sigma, _ = torch.linalg.svd(torch.cat([J.flatten(1) for J in jacobians], 1), full_matrices=False)
    U = U[:, sigma > 1e-10 * sigma[0]]
    return U @ U.mT


def gradients(point: TuckerFactors, G: Tensor) -> TuckerFactors:
    """Return what autograd gives for the loss ``<G, W>``."""
    core = point.core.clone().requires_grad_()
    bases = tuple(None if U is None else U.clone().requires_grad_() for U in point.bases)
    (TuckerFactors(core, bases).to_dense() * G).sum().backward()
    assert core.grad is not None
    return TuckerFactors(core.grad, tuple(None if U is None else U.grad for U in bases))


def tangent_of(at: TuckerFactors, seed: int = 1) -> TuckerTangent:
    """Return a random tangent vector."""
    return tucker.project(at, TuckerFactors(randn(*at.shape, seed=seed), (None,) * len(at.shape)))


# --- points ------------------------------------------------------------------------------------------------------


def test_a_tucker_tensor_is_what_einsum_says():
    core, U, V = randn(3, 2, 3, 2), randn(7, 3, seed=1), randn(5, 2, seed=2)
    expected = torch.einsum("rshw,or,is->oihw", core, U, V)
    torch.testing.assert_close(TuckerFactors(core, (U, V, None, None)).to_dense(), expected)


@pytest.mark.parametrize("mode", range(4))
def test_folding_undoes_unfolding(mode: int):
    tensor = randn(2, 3, 4, 5)
    torch.testing.assert_close(tucker.fold(tucker.unfold(tensor, mode), mode, tensor.shape), tensor, atol=0, rtol=0)


def check_gauge(at: TuckerFactors, tolerance: float = 1e-12) -> None:
    for mode, U in at.modes():
        torch.testing.assert_close(U.mT @ U, torch.eye(U.shape[1], dtype=U.dtype), atol=tolerance, rtol=0)
        rows = tucker.unfold(at.core, mode)
        sigma = linalg.row_norms(rows)
        unit = rows / sigma.unsqueeze(-1)
        torch.testing.assert_close(unit @ unit.mT, torch.eye(len(rows), dtype=U.dtype), atol=tolerance, rtol=0)
        assert all(a >= b * (1 - 1e-9) for a, b in pairwise(sigma.tolist()))


def test_a_point_is_in_the_gauge_and_shows_the_singular_values_of_the_unfoldings(case):
    at = point_of(*case)
    check_gauge(at)
    W = at.to_dense()
    for mode, sigma in enumerate(tucker.spectra(at)):
        if sigma is not None:
            expected = torch.linalg.svdvals(tucker.unfold(W, mode))[: len(sigma)]
            torch.testing.assert_close(sigma, expected, atol=1e-12, rtol=1e-10)


def test_full_ranks_keep_the_weight_and_lower_ones_lose_no_more_than_the_tails(case):
    shape, ranks = case
    W = randn(*shape)
    full = tuple(None if r is None else min(n, math.prod(shape) // n) for n, r in zip(shape, ranks, strict=True))
    torch.testing.assert_close(tucker.from_dense(W, ranks=full).to_dense(), W, atol=1e-12, rtol=0)
    error = float((tucker.from_dense(W, ranks=ranks).to_dense() - W).norm())
    tails = [
        float(linalg.tails(torch.linalg.svdvals(tucker.unfold(W, mode)))[r])
        for mode, r in enumerate(ranks)
        if r is not None
    ]
    assert max(tails) - 1e-12 <= error <= sum(t**2 for t in tails) ** 0.5 + 1e-12


def test_truncation_stays_within_its_bound_and_in_the_gauge():
    at = point_of((7, 6, 3, 3), (6, 5, None, None))
    cut = tucker.truncate(at, ranks=(4, 2, None, None))
    check_gauge(cut)
    error, bound = float((cut.to_dense() - at.to_dense()).norm()), tucker.truncation_bound(at, ranks=cut.ranks)
    one = tucker.truncate(at, ranks=(4, 5, None, None))
    assert 0.5 * bound < error <= bound
    # In a single mode the tail is the error itself.
    exact = tucker.truncation_bound(at, ranks=one.ranks)
    assert float((one.to_dense() - at.to_dense()).norm()) == pytest.approx(exact, rel=1e-10)


def test_any_gauge_can_be_read(case):
    at = point_of(*case)
    bases = list(at.bases)
    core = at.core
    for mode, U in at.modes():
        Y = randn(U.shape[1], U.shape[1], seed=mode) + 2 * torch.eye(U.shape[1], dtype=torch.float64)
        bases[mode] = U @ Y
        core = tucker.multiply(core, [torch.linalg.inv(Y) if m == mode else None for m in range(core.dim())])
    again = tucker.read(TuckerFactors(core, tuple(bases)))
    check_gauge(again)
    torch.testing.assert_close(again.to_dense(), at.to_dense(), atol=1e-10, rtol=1e-10)


def test_a_direction_that_is_lost_comes_back_at_the_floor():
    at = point_of((7, 5, 3, 2), (3, 2, None, None))
    core = at.core.clone()
    core[2] = 0
    core[:, 1] = 0
    back = tucker.to_gauge(TuckerFactors(core, at.bases), floor=1e-6)
    for sigma in tucker.spectra(back):
        if sigma is not None:
            assert float(sigma[-1] / sigma[0]) == pytest.approx(1e-6, rel=1e-3)
    torch.testing.assert_close(back.to_dense(), TuckerFactors(core, at.bases).to_dense(), atol=1e-4, rtol=0)
    zero = tucker.to_gauge(TuckerFactors(torch.zeros_like(core), at.bases))
    assert torch.isfinite(zero.core).all()
    assert float(zero.to_dense().norm()) < 1e-6


def test_grown_bases_keep_the_weight_and_can_be_read_with_a_floor():
    at = point_of((7, 5, 3, 2), (3, 2, None, None))
    columns = (
        linalg.complement(at.bases[0], randn(7, 2), 2),
        linalg.complement(at.bases[1], randn(5, 1), 1),
        None,
        None,
    )
    grown = tucker.augment(at, columns)
    assert grown.ranks == (5, 3, None, None)
    torch.testing.assert_close(grown.to_dense(), at.to_dense(), atol=1e-14, rtol=0)
    ready = tucker.to_gauge(tucker.augment(at, columns, floor=1e-8))
    assert ready.ranks == (5, 3, None, None)
    check_gauge(ready)
    torch.testing.assert_close(ready.to_dense(), at.to_dense(), atol=1e-6, rtol=0)


def test_no_rank_grows_beyond_the_product_of_the_others():
    at = point_of((9, 4, 1, 2), (2, 1, None, None))
    grown = tucker.augment(at, (linalg.complement(at.bases[0], randn(9, 5), 5), None, None, None), floor=1e-8)
    assert grown.ranks == (2, 1, None, None)


def test_changing_bases_projects(case):
    at, other = point_of(*case), point_of(*case, seed=1)
    W = at.to_dense()
    expected = tucker.multiply(W, [None if U is None else U @ U.mT for U in other.bases])
    torch.testing.assert_close(tucker.change_bases(at, other.bases).to_dense(), expected, atol=1e-12, rtol=0)


@pytest.mark.parametrize(
    ("ranks", "message"),
    [
        ((3, 2), "one rank or None for each of 4"),
        ((None, None, None, None), "one rank or None"),
        ((8, 2, None, None), "rank of mode 0 must be between 1 and 7"),
        ((0, 2, None, None), "rank of mode 0 must be between 1"),
        ((5, 1, 2, 2), "rank of mode 0 must be between 1 and 4"),
    ],
)
def test_impossible_ranks_are_named(ranks: tucker.Ranks, message: str):
    with pytest.raises(ValueError, match=message):
        tucker.from_dense(randn(7, 5, 3, 2), ranks=ranks)


# --- tangent vectors ---------------------------------------------------------------------------------------------


def test_the_projection_is_the_dense_projector_on_all_derivatives(case):
    at = point_of(*case)
    G = randn(*at.shape, seed=3)
    expected = (projector(at) @ G.flatten()).reshape(at.shape)
    vector = tucker.project(at, TuckerFactors(G, (None,) * G.dim()))
    torch.testing.assert_close(dense_of(at, vector), expected, atol=1e-10, rtol=0)
    parts = [vector.core, *(K for K in vector.slopes if K is not None)]
    assert float(sum(p.square().sum() for p in parts)) == pytest.approx(float(expected.square().sum()), rel=1e-9)


def test_the_gradients_of_what_is_stored_give_the_projected_gradient(case):
    at = point_of(*case)
    G = randn(*at.shape, seed=3)
    expected = tucker.project(at, TuckerFactors(G, (None,) * G.dim()))
    vector = tucker.project_gradient(at, gradients(at, G))
    torch.testing.assert_close(dense_of(at, vector), dense_of(at, expected), atol=1e-10, rtol=0)


def test_the_projected_gradient_is_read_from_any_gauge(case):
    at = point_of(*case)
    bases, core = list(at.bases), at.core
    for mode, U in at.modes():
        Y = randn(U.shape[1], U.shape[1], seed=mode) + 2 * torch.eye(U.shape[1], dtype=torch.float64)
        bases[mode] = U @ Y
        core = tucker.multiply(core, [torch.linalg.inv(Y) if m == mode else None for m in range(core.dim())])
    point = TuckerFactors(core, tuple(bases))
    G = randn(*at.shape, seed=3)
    now = tucker.read(point)
    vector = tucker.project_gradient(now, tucker.turn_gradient(gradients(point, G), point, now))
    expected = (projector(at) @ G.flatten()).reshape(at.shape)
    torch.testing.assert_close(dense_of(now, vector), expected, atol=1e-8, rtol=0)


def test_small_singular_values_cost_no_precision():
    """In float32, slopes agree with the dense projection to rounding though singular values fall to 1e-7."""
    at = point_of((12, 10, 3, 3), (6, 5, None, None))
    decay = [10.0 ** torch.linspace(0, -7, r, dtype=torch.float64) for r in (6, 5)]
    core = at.core * decay[0][:, None, None, None] * decay[1][None, :, None, None]
    exact = tucker.to_gauge(TuckerFactors(core, at.bases), floor=0.0)
    G = randn(*at.shape, seed=3)
    stored = TuckerFactors(exact.core.float(), tuple(None if U is None else U.float() for U in exact.bases))
    found = tucker.project_gradient(stored, gradients(stored, G.float()))
    double = TuckerFactors(stored.core.double(), tuple(None if U is None else U.double() for U in stored.bases))
    expected = tucker.project(double, TuckerFactors(G, (None,) * 4))
    for mode, _ in at.modes():
        slope, wanted = found.slopes[mode], expected.slopes[mode]
        assert slope is not None
        assert wanted is not None
        assert float((slope - wanted).norm() / wanted.norm()) < 1e-5


def test_a_vector_is_carried_by_the_dense_projector(case):
    old, new = point_of(*case), point_of(*case, seed=1)
    vector = tangent_of(old)
    torch.testing.assert_close(tucker.embed(old, vector).to_dense(), dense_of(old, vector), atol=1e-11, rtol=0)
    expected = (projector(new) @ dense_of(old, vector).flatten()).reshape(new.shape)
    torch.testing.assert_close(dense_of(new, tucker.transport(vector, old, new)), expected, atol=1e-10, rtol=0)


def test_vectors_add_up(case):
    at = point_of(*case)
    a, b = tangent_of(at, 1), tangent_of(at, 2)
    expected = 3 * dense_of(at, a) + 0.5 * dense_of(at, b)
    torch.testing.assert_close(dense_of(at, a.scaled(3).plus(b, times=0.5)), expected)


# --- steps -------------------------------------------------------------------------------------------------------


def test_the_augmented_step_is_exact(case):
    at = point_of(*case)
    step = tangent_of(at)
    moved = tucker.augmented(at, step)
    torch.testing.assert_close(moved.to_dense(), at.to_dense() - dense_of(at, step), atol=1e-11, rtol=0)
    for mode, U in moved.modes():
        torch.testing.assert_close(U.mT @ U, torch.eye(U.shape[1], dtype=U.dtype), atol=1e-12, rtol=0)
        K = step.slopes[mode]
        assert K is not None
        inside = U @ (U.mT @ K)
        torch.testing.assert_close(inside, K, atol=1e-11, rtol=0)  # every K-step lies in the augmented basis


@pytest.mark.parametrize("retract", [tucker.retract_qr, tucker.retract_hosvd])
def test_a_retraction_is_right_to_second_order(retract: Callable, case):
    at = point_of(*case)
    step = tangent_of(at)
    step = step.scaled(float(tucker.spectra(at)[0][-1]) / float(dense_of(at, step).norm()))  # type: ignore[index]
    errors = []
    for h in (2e-2, 1e-2, 5e-3):
        new = retract(at, step.scaled(h))
        assert new.ranks == at.ranks
        check_gauge(new, 1e-10)
        errors.append(float((new.to_dense() - (at.to_dense() - h * dense_of(at, step))).norm()))
    assert all(after <= before / 3.5 + 1e-12 for before, after in pairwise(errors)), errors


def test_the_hosvd_retraction_truncates_the_dense_step(case):
    at = point_of(*case)
    step = tangent_of(at).scaled(0.3)
    W = at.to_dense() - dense_of(at, step)
    expected = W
    for mode, rank in enumerate(at.ranks):
        if rank is not None:
            U = torch.linalg.svd(tucker.unfold(W, mode))[0][:, :rank]
            expected = tucker.multiply(expected, [U @ U.mT if m == mode else None for m in range(W.dim())])
    torch.testing.assert_close(tucker.retract_hosvd(at, step).to_dense(), expected, atol=1e-9, rtol=0)


def test_core_steps_in_the_augmented_bases_raise_the_ranks_to_first_order():
    """The basis update of all modes, then a step of the core there: what is truncated to a tolerance can grow."""
    at = point_of((7, 5, 3, 2), (2, 2, None, None))
    target = randn(7, 5, 3, 2, seed=4)
    h = 0.05
    G = at.to_dense() - target
    wide = tucker.augmented(at, tucker.project(at, TuckerFactors(G, (None,) * 4)).scaled(h))
    before = [float(s[2]) for s in tucker.spectra(tucker.to_gauge(wide, floor=0.0)) if s is not None]
    slope = tucker.multiply(wide.to_dense() - target, [None if U is None else U.mT for U in wide.bases])
    moved = TuckerFactors(wide.core - h * slope, wide.bases)
    expected = wide.to_dense() - h * tucker.multiply(
        wide.to_dense() - target, [None if U is None else U @ U.mT for U in wide.bases]
    )
    torch.testing.assert_close(moved.to_dense(), expected, atol=1e-12, rtol=0)
    after = [float(s[2]) for s in tucker.spectra(tucker.to_gauge(moved, floor=0.0)) if s is not None]
    assert all(late > 0.3 * h for late in after), (before, after)


def test_the_step_descends_and_repeats_the_dense_one():
    """Thirty small steps with momentum stay by a plain computation that projects and truncates dense tensors."""
    at = dense_at = point_of((6, 5, 3, 2), (3, 2, None, None))
    target = randn(6, 5, 3, 2, seed=5)
    past, V = tangent_of(at).scaled(0.0), torch.zeros(6, 5, 3, 2, dtype=torch.float64)
    losses = []
    for _ in range(30):
        G = at.to_dense() - target
        losses.append(float(G.square().sum()))
        gradient = tucker.project_gradient(at, gradients(at, G))
        at, past = tucker.tangent_step(at, gradient, past, lr=2e-3, momentum=0.9)

        P = projector(dense_at)
        g = (P @ (dense_at.to_dense() - target).flatten()).reshape(target.shape)
        V = g + 0.9 * V
        dense_at = tucker.from_dense(dense_at.to_dense() - 2e-3 * (g + 0.9 * V), ranks=dense_at.ranks)
        V = (projector(dense_at) @ V.flatten()).reshape(target.shape)
    moved = float((dense_at.to_dense() - point_of((6, 5, 3, 2), (3, 2, None, None)).to_dense()).norm())
    assert losses[-1] < losses[0]
    assert float((at.to_dense() - dense_at.to_dense()).norm()) < 1e-2 * moved
    torch.testing.assert_close(dense_of(at, past), V, atol=2e-2 * float(V.norm()), rtol=0)


def test_the_orthogonalised_direction_of_a_1x1_kernel_is_that_of_the_matrix():
    at = point_of((8, 6, 1, 1), (3, 3, None, None))
    vector = tangent_of(at)
    U, V = at.bases[:2]
    assert U is not None
    assert V is not None
    T = dense_of(at, vector)[:, :, 0, 0]
    S = U.mT @ T @ V
    matrix = TangentVector(S, T @ V - U @ S, T.mT @ U - V @ S.mT)
    zero = LowRankFactors(U, torch.zeros_like(S), V)
    expected = -augmented(zero, TangentMuon().direction(matrix, (8, 6))).to_dense()
    found = dense_of(at, tucker.orthogonalised(at, vector))[:, :, 0, 0]
    torch.testing.assert_close(found, expected, atol=1e-10, rtol=0)


def test_the_orthogonalised_direction_does_not_feel_the_size_of_the_gradient(case):
    at = point_of(*case)
    vector = tangent_of(at)
    one, tiny = tucker.orthogonalised(at, vector), tucker.orthogonalised(at, vector.scaled(1e-6))
    torch.testing.assert_close(one.core, tiny.core, atol=1e-6, rtol=1e-6)
    size = (at.shape[0] / math.prod(at.shape[1:])) ** 0.5
    assert float(torch.linalg.matrix_norm(tucker.unfold(dense_of(at, one), 0), 2)) < 2 * size
