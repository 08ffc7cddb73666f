"""Laws of points on the manifold and of the balanced diagonal gauge, each against the dense matrix."""

import pytest
import torch
from torch import Tensor

from dynarank import factors
from dynarank.factors import FactorPair, LowRankFactors

SHAPES = [(7, 5), (5, 7), (6, 6)]
RANKS = [1, 3, 5]
SPREADS = [-1.0, -8.0]  # decades from the first singular value to the last


def draw(*shape: int, seed: int = 1) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def orthonormal(*shape: int, seed: int = 1) -> Tensor:
    return torch.linalg.qr(draw(*shape, seed=seed))[0]


def make_factors(m: int, n: int, rank: int, *, spread: float = -2.0, batch: tuple[int, ...] = ()) -> LowRankFactors:
    """Diagonalised factors whose singular values fall from 2 by ``spread`` decades."""
    sigma = 2 * torch.logspace(0, spread, rank, dtype=torch.float64).expand(*batch, rank)
    return LowRankFactors(orthonormal(*batch, m, rank), torch.diag_embed(sigma), orthonormal(*batch, n, rank, seed=2))


def invertible(rank: int, condition: float) -> Tensor:
    return (
        orthonormal(rank, rank, seed=3)
        * torch.logspace(0, -torch.tensor(condition).log10(), rank).double()
        @ (orthonormal(rank, rank, seed=4).mT)
    )


def regauged(pair: FactorPair, C: Tensor) -> FactorPair:
    """The same matrix in another gauge: ``A -> C^T A``, ``B -> C^-1 B``."""
    return FactorPair(C.mT @ pair.A, torch.linalg.solve(C, pair.B))


def check_diagonalised(point: LowRankFactors, W: Tensor, *, atol: float = 1e-12) -> None:
    """Orthonormal bases, a diagonal and descending S, and the matrix itself."""
    eye = torch.eye(point.U.shape[-1], dtype=point.U.dtype)
    torch.testing.assert_close(point.U.mT @ point.U, eye.expand_as(point.S), atol=atol, rtol=0)
    torch.testing.assert_close(point.V.mT @ point.V, eye.expand_as(point.S), atol=atol, rtol=0)
    assert torch.equal(point.S, torch.diag_embed(point.sigma))
    assert bool((point.sigma[..., :-1] >= point.sigma[..., 1:]).all()) and bool((point.sigma >= 0).all())
    torch.testing.assert_close(point.to_dense(), W, atol=atol, rtol=0)


# --- algebra -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [*SHAPES, (2, 3, 7, 5)])
@pytest.mark.parametrize("rank", RANKS)
def test_from_dense_is_the_best_approximation(shape: tuple[int, ...], rank: int):
    W = draw(*shape)
    point = factors.from_dense(W, rank=rank)
    assert point.rank == rank and point.shape == shape[-2:]
    tail = torch.linalg.vector_norm(torch.linalg.svdvals(W)[..., rank:], dim=-1)
    torch.testing.assert_close(torch.linalg.matrix_norm(W - point.to_dense()), tail, atol=1e-12, rtol=0)


@pytest.mark.parametrize("batch", [(), (2, 3)])
@pytest.mark.parametrize("rank", [1, 2, 4])
def test_truncation_error_is_the_tail(rank: int, batch: tuple[int, ...]):
    point = make_factors(7, 5, 4, batch=batch)
    cut = factors.truncate(point, rank=rank)
    tail = torch.linalg.vector_norm(point.sigma[..., rank:], dim=-1)
    error = torch.linalg.matrix_norm(point.to_dense() - cut.to_dense())
    torch.testing.assert_close(error, tail, atol=1e-14, rtol=0)
    assert cut.rank == rank and all(part.is_contiguous() for part in (cut.U, cut.S, cut.V))


@pytest.mark.parametrize("size", [(3, 3), (3, 2), (2, 3), (1, 1)])
@pytest.mark.parametrize("batch", [(), (2,)])
def test_diagonalise_keeps_the_matrix(size: tuple[int, int], batch: tuple[int, ...]):
    left, right = orthonormal(*batch, 7, size[0]), orthonormal(*batch, 5, size[1], seed=2)
    point = LowRankFactors(left, draw(*batch, *size), right)
    check_diagonalised(factors.diagonalise(point), point.to_dense())
    assert factors.diagonalise(point).rank == point.rank == min(size)


def test_diagonalise_takes_a_singular_core():
    S = torch.ones(3, 3, dtype=torch.float64)
    point = LowRankFactors(orthonormal(7, 3), S, orthonormal(5, 3, seed=2))
    check_diagonalised(factors.diagonalise(point), point.to_dense())


@pytest.mark.parametrize("grown", [0, 1, 2])
def test_augmentation_keeps_the_matrix(grown: int):
    point = make_factors(7, 5, 3)
    left, right = (
        torch.linalg.qr(torch.cat([basis, draw(len(basis), grown, seed=5)], -1))[0][:, 3:]
        for basis in (point.U, point.V)
    )
    new = factors.augment(point, left=left, right=right)
    assert new.rank == 3 + grown
    torch.testing.assert_close(new.to_dense(), point.to_dense(), atol=1e-14, rtol=0)
    torch.testing.assert_close(new.U.mT @ new.U, torch.eye(3 + grown, dtype=torch.float64), atol=1e-13, rtol=0)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("rank", RANKS)
def test_change_of_bases_is_the_projection(shape: tuple[int, int], rank: int):
    point = make_factors(*shape, 3)
    U, V = orthonormal(shape[0], rank, seed=5), orthonormal(shape[1], rank, seed=6)
    projection = U @ U.mT @ point.to_dense() @ V @ V.mT
    new = factors.change_bases(point, U=U, V=V)
    torch.testing.assert_close(new.to_dense(), projection, atol=1e-13, rtol=0)


# --- the balanced diagonal gauge ---------------------------------------------------------------------------------


@pytest.mark.parametrize("batch", [(), (2, 3)])
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("rank", RANKS)
@pytest.mark.parametrize("spread", SPREADS)
def test_balanced_round_trip(shape: tuple[int, int], rank: int, spread: float, batch: tuple[int, ...]):
    point = make_factors(*shape, rank, spread=spread, batch=batch)
    pair = factors.to_pair(point)
    torch.testing.assert_close(pair.to_dense(), point.to_dense(), atol=1e-14, rtol=0)
    gram_A, gram_B = pair.A @ pair.A.mT, pair.B @ pair.B.mT  # both Sigma
    torch.testing.assert_close(gram_A, point.S, atol=1e-14, rtol=0)
    torch.testing.assert_close(gram_B, point.S, atol=1e-14, rtol=0)
    back = factors.read_balanced(pair)
    for name in "UV":
        torch.testing.assert_close(getattr(back, name), getattr(point, name), atol=1e-12, rtol=0)
    torch.testing.assert_close(back.sigma, point.sigma, rtol=1e-12, atol=0)


@pytest.mark.parametrize("scale", [1e-20, 1.0, 1e20])
@pytest.mark.parametrize("shape", SHAPES)
def test_balanced_round_trip_in_float32_down_to_the_floor(shape: tuple[int, int], scale: float):
    point = make_factors(*shape, 5, spread=-8)
    small = LowRankFactors(point.U.float(), (scale * point.S).float(), point.V.float())
    back = factors.read_balanced(factors.to_pair(small))
    torch.testing.assert_close(back.U.double(), point.U, atol=1e-6, rtol=0)
    torch.testing.assert_close(back.V.double(), point.V, atol=1e-6, rtol=0)
    torch.testing.assert_close(back.sigma.double() / scale, point.sigma, rtol=1e-6, atol=0)


def test_the_floor_is_written_and_nothing_below_it():
    point = make_factors(7, 5, 4)
    weak = LowRankFactors(point.U, torch.diag(torch.tensor([2.0, 1e-7, 1e-12, 0.0]).double()), point.V)
    sigma = factors.read_balanced(factors.to_pair(weak)).sigma
    torch.testing.assert_close(sigma, torch.tensor([2.0, 1e-7, 2e-8, 2e-8]).double(), rtol=1e-6, atol=0)
    sigma = factors.read_balanced(factors.to_pair(weak, floor=1e-3)).sigma
    torch.testing.assert_close(sigma, torch.tensor([2.0, 2e-3, 2e-3, 2e-3]).double(), rtol=1e-6, atol=0)


def test_zero_is_written_with_the_floor_and_reads_back():
    point = make_factors(7, 5, 3)
    back = factors.read_balanced(factors.to_pair(LowRankFactors(point.U, torch.zeros_like(point.S), point.V)))
    torch.testing.assert_close(back.sigma, torch.full((3,), factors.FLOOR).double())
    torch.testing.assert_close(back.U, point.U)


@pytest.mark.parametrize("factor", [1e-3, 0.98, 1.0, 3.0])
def test_scaling_scales_the_matrix_and_keeps_the_gauge(factor: float):
    point = make_factors(7, 5, 3)
    pair = factors.to_pair(point)
    for scaled in (factors.scaled(point, factor), factors.scaled(pair, factor)):
        torch.testing.assert_close(scaled.to_dense(), factor * point.to_dense())
    torch.testing.assert_close(factors.read_balanced(factors.scaled(pair, factor)).U, point.U)


@pytest.mark.parametrize("factor", [0.0, -0.5, float("nan")])
def test_scaling_refuses_what_would_destroy_the_gauge(factor: float):
    with pytest.raises(ValueError, match="factor above 0"):
        factors.scaled(factors.to_pair(make_factors(7, 5, 3)), factor)


# --- the general read --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("rank", RANKS)
@pytest.mark.parametrize("condition", [1.0, 30.0, 1e3])
def test_every_route_reads_every_gauge(shape: tuple[int, int], rank: int, condition: float):
    point = make_factors(*shape, rank, spread=-0.5)
    W = point.to_dense()
    pair = regauged(factors.to_pair(point), invertible(rank, condition))
    for read in (factors.read_pair, factors._read_by_qr):
        found = read(pair)
        check_diagonalised(found, W)
        torch.testing.assert_close(found.sigma, point.sigma, atol=1e-12, rtol=0)
    by_gram = factors._read_by_gram(pair)
    assert by_gram is not None or condition > 1
    if by_gram is not None:
        check_diagonalised(by_gram, W)


@pytest.mark.parametrize("rank", [3, 5])
def test_the_gram_route_leaves_near_dependent_rows_to_qr(rank: int):
    pair = factors.to_pair(make_factors(7, 5, rank, spread=0))
    near = FactorPair(pair.A.clone(), pair.B)
    near.A[1] = near.A[0] + 1e-9 * near.A[1]
    assert factors._read_by_gram(near) is None
    check_diagonalised(factors.read_pair(near), near.to_dense())


@pytest.mark.parametrize("spread", SPREADS)
def test_both_routes_read_the_balanced_gauge_itself(spread: float):
    point = make_factors(7, 5, 4, spread=spread)
    pair = factors.to_pair(point)
    for found in (factors._read_by_gram(pair), factors._read_by_qr(pair)):
        check_diagonalised(found, point.to_dense())
        torch.testing.assert_close(found.sigma, point.sigma, rtol=1e-6, atol=0)
        # The bases agree up to the sign of each direction, the weakest ones included.
        for name in "UV":
            inner = (getattr(found, name).mT @ getattr(point, name)).abs()
            torch.testing.assert_close(inner, torch.eye(4).double(), atol=1e-6, rtol=0)


@pytest.mark.parametrize("condition", [1.0, 100.0])
@pytest.mark.parametrize("scale", [1e-12, 1.0, 1e12])
def test_float32_pairs_are_read_to_float32(condition: float, scale: float):
    pair = regauged(factors.to_pair(make_factors(7, 5, 4)), invertible(4, condition))
    single = FactorPair(scale * pair.A.float(), scale * pair.B.float())
    for read in (factors.read_pair, factors._read_by_qr):
        found = read(single)
        assert found.U.dtype == found.S.dtype == found.V.dtype == torch.float32
        balanced = LowRankFactors(found.U, found.S / scale**2, found.V)
        check_diagonalised(balanced, single.A.mT @ (single.B / scale**2), atol=2e-6 * condition**0.5)


def test_the_general_read_takes_batches():
    point = make_factors(7, 5, 3, batch=(2, 4))
    pair = factors.to_pair(point)
    for found in (factors.read_pair(pair), factors._read_by_gram(pair), factors._read_by_qr(pair)):
        check_diagonalised(found, point.to_dense())
    pair.A[1, 2, 0] = pair.A[1, 2, 1]  # one layer of the batch is dependent
    assert factors._read_by_gram(pair) is None
    check_diagonalised(factors.read_pair(pair), pair.to_dense())


def test_half_precision_is_read_in_float32():
    pair = factors.to_pair(make_factors(7, 5, 3))
    half = FactorPair(pair.A.bfloat16(), pair.B.bfloat16())
    for found in (factors.read_balanced(half), factors.read_pair(half)):
        assert found.U.dtype == found.S.dtype == torch.float32
    check_diagonalised(factors.read_pair(half), half.A.float().mT @ half.B.float(), atol=1e-5)


SINGULAR = {
    "zero row": lambda A: A * torch.tensor([[1.0], [0.0], [1.0]]),
    "all zero": lambda A: 0 * A,
    "equal rows": lambda A: A[[0, 0, 2]],
    "sum of the others": lambda A: torch.stack([A[0], A[1], A[0] + A[1]]),
    "nearly equal": lambda A: torch.stack([A[0], A[0] + 1e-10 * A[1], A[2]]),
}


@pytest.mark.parametrize("kind", SINGULAR)
@pytest.mark.parametrize("side", "AB")
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_singular_factors_are_found_and_read(kind: str, side: str, dtype: torch.dtype):
    pair = factors.to_pair(make_factors(7, 5, 3))
    parts = {"A": pair.A, "B": pair.B, side: SINGULAR[kind](getattr(pair, side))}
    broken = FactorPair(parts["A"].to(dtype), parts["B"].to(dtype))
    assert factors.is_singular(broken)
    read = factors.read_pair(broken)
    check_diagonalised(read, broken.to_dense(), atol=1e-12 if dtype == torch.float64 else 1e-5)
    assert not factors.is_singular(factors.to_pair(read))  # rewriting gives fresh directions at the floor


@pytest.mark.parametrize(("spread", "condition"), [(-1.0, 1.0), (-1.0, 30.0), (-8.0, 1.0)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_healthy_factors_are_not_called_singular(spread: float, condition: float, dtype: torch.dtype):
    pair = factors.to_pair(make_factors(7, 5, 4, spread=spread))
    for healthy in (pair, regauged(pair, invertible(4, condition))):
        assert not factors.is_singular(FactorPair(healthy.A.to(dtype), healthy.B.to(dtype)))


def test_reading_refuses_nan():
    pair = factors.to_pair(make_factors(7, 5, 3))
    pair.A[1, 1] = float("nan")
    assert factors.is_singular(pair)
    with pytest.raises(ValueError, match="NaN"):
        factors.read_pair(pair)


def test_nothing_is_changed_in_place_or_drawn():
    point = make_factors(7, 5, 3)
    pair, before = factors.to_pair(point), torch.get_rng_state()
    kept = [part.clone() for part in (point.U, point.S, point.V, pair.A, pair.B)]
    factors.diagonalise(point), factors.truncate(point, rank=1), factors.scaled(pair, 0.5)
    factors.read_pair(pair), factors.read_balanced(pair), factors._read_by_qr(pair), factors.is_singular(pair)
    for part, copy in zip((point.U, point.S, point.V, pair.A, pair.B), kept, strict=True):
        assert torch.equal(part, copy)
    assert torch.equal(before, torch.get_rng_state())
