"""Points and tangent vectors of low multilinear rank, against plain dense computations in float64."""

import math
from itertools import pairwise

import pytest
import torch
from torch import Tensor

from dynarank import linalg, tucker
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


def spectra(at: TuckerFactors) -> list[Tensor]:
    """Return the norms of the slices of the core along each factored mode."""
    return [linalg.row_norms(tucker.unfold(at.core, mode)) for mode, _ in at.modes()]


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
    for (mode, _), sigma in zip(at.modes(), spectra(at), strict=True):
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
    error = float((cut.to_dense() - at.to_dense()).norm())
    tails = [float(sigma[rank:].norm()) for sigma, rank in zip(spectra(at), (4, 2), strict=True)]
    bound = math.hypot(*tails)
    assert 0.5 * bound < error <= bound
    # In a single mode the tail is the error itself.
    one = tucker.truncate(at, ranks=(4, 5, None, None))
    assert float((one.to_dense() - at.to_dense()).norm()) == pytest.approx(tails[0], rel=1e-10)


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
    for sigma in spectra(back):
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


def test_the_gradients_of_what_is_stored_give_the_projected_gradient(case):
    at = point_of(*case)
    G = randn(*at.shape, seed=3)
    expected = (projector(at) @ G.flatten()).reshape(at.shape)
    vector = tucker.project_gradient(at, gradients(at, G))
    torch.testing.assert_close(dense_of(at, vector), expected, atol=1e-10, rtol=0)
    torch.testing.assert_close(tucker.dense_tangent(at, vector), expected, atol=1e-10, rtol=0)
    parts = [vector.core, *(K for K in vector.slopes if K is not None)]
    assert float(sum(p.square().sum() for p in parts)) == pytest.approx(float(expected.square().sum()), rel=1e-9)


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
    for mode, U in double.modes():
        Q, _ = tucker.row_frame(double.core, mode)
        others = [None if V is None or m == mode else V.mT for m, V in enumerate(double.bases)]
        wanted = tucker.unfold(tucker.multiply(G, others), mode) @ Q
        wanted = wanted - U @ (U.mT @ wanted)
        slope = found.slopes[mode]
        assert slope is not None
        assert float((slope - wanted).norm() / wanted.norm()) < 1e-5
