"""Laws of the linear algebra, each against a plain dense computation."""

import pytest
import torch
from torch import Tensor

from dynarank import linalg

SHAPES = [(7, 5), (5, 7), (6, 6), (7, 1), (1, 5), (1, 1), (3, 7, 5), (2, 3, 5, 7)]


def draw(*shape: int, dtype: torch.dtype = torch.float64, seed: int = 1) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def identity_error(Q: Tensor) -> float:
    return float((Q.mT @ Q - torch.eye(Q.shape[-1], dtype=Q.dtype)).abs().max())


def spectrum_matrix(sigma: list[float], rows: int, columns: int) -> Tensor:
    """A matrix with the given singular values and random bases."""
    U, V = (torch.linalg.qr(draw(size, len(sigma), seed=size))[0] for size in (rows, columns))
    return U @ torch.diag(torch.tensor(sigma, dtype=torch.float64)) @ V.mT


def fail_times(monkeypatch: pytest.MonkeyPatch, count: int) -> None:
    """Let the first ``count`` calls of ``torch.linalg.svd`` not converge."""
    real, calls = torch.linalg.svd, []

    def svd(*args, **kwargs):
        calls.append(args)
        if len(calls) <= count:
            raise torch.linalg.LinAlgError("did not converge")
        return real(*args, **kwargs)

    monkeypatch.setattr(torch.linalg, "svd", svd)


# --- singular value decomposition --------------------------------------------------------------------------------


def check_svd(matrix: Tensor, atol: float) -> None:
    U, sigma, V = linalg.svd(matrix)
    size = min(matrix.shape[-2:])
    assert (U.shape, sigma.shape) == ((*matrix.shape[:-1], size), (*matrix.shape[:-2], size))
    assert V.shape == (*matrix.shape[:-2], matrix.shape[-1], size)
    torch.testing.assert_close(U @ torch.diag_embed(sigma) @ V.mT, matrix, atol=atol, rtol=0)
    torch.testing.assert_close(sigma, torch.linalg.svdvals(matrix), atol=atol, rtol=0)
    assert bool((sigma[..., :-1] >= sigma[..., 1:]).all())
    assert max(identity_error(U), identity_error(V)) < 1e-12
    assert U.is_contiguous() and sigma.is_contiguous() and V.is_contiguous()


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("failures", [0, 1, 99])
def test_svd_reconstructs_with_v_and_not_its_transpose(monkeypatch, shape: tuple[int, ...], failures: int):
    fail_times(monkeypatch, failures)
    check_svd(draw(*shape), atol=1e-12)


@pytest.mark.parametrize("scale", [1e-200, 1.0, 1e200])
@pytest.mark.parametrize("shape", [(7, 5), (5, 7)])
def test_the_last_resort_takes_deficient_matrices_of_any_size(monkeypatch, shape: tuple[int, int], scale: float):
    fail_times(monkeypatch, 99)
    matrix = spectrum_matrix([1.0, 1e-3, 1e-9, 1e-9, 0.0], *shape)
    U, sigma, V = linalg.svd(scale * matrix)
    torch.testing.assert_close((U * (sigma / scale).unsqueeze(-2)) @ V.mT, matrix, atol=3e-8, rtol=0)
    assert max(identity_error(U), identity_error(V)) < 1e-12
    assert bool((sigma[:-1] >= sigma[1:]).all())


def test_the_last_resort_takes_zero(monkeypatch):
    fail_times(monkeypatch, 99)
    U, sigma, V = linalg.svd(torch.zeros(7, 5, dtype=torch.float64))
    assert float(sigma.abs().max()) == 0 and max(identity_error(U), identity_error(V)) < 1e-12


@pytest.mark.parametrize("failures", [0, 1, 99])
def test_svd_keeps_float32(monkeypatch, failures: int):
    fail_times(monkeypatch, failures)
    matrix = draw(7, 5, dtype=torch.float32)
    U, sigma, V = linalg.svd(matrix)
    assert U.dtype == sigma.dtype == V.dtype == torch.float32
    torch.testing.assert_close((U * sigma) @ V.mT, matrix, atol=1e-6, rtol=0)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("shape", [(7, 5), (3, 5, 7)])
def test_svd_refuses_what_is_not_finite(shape: tuple[int, ...], bad: float):
    matrix = draw(*shape)
    matrix[..., 2, 1] = bad
    with pytest.raises(ValueError, match=r"svd needs finite entries, got NaN or infinity in a matrix of shape \("):
        linalg.svd(matrix)


# --- orthonormal bases -------------------------------------------------------------------------------------------

HARD = {
    "random": lambda m, n: draw(m, n),
    "zero": lambda m, n: torch.zeros(m, n, dtype=torch.float64),
    "equal columns": lambda m, n: draw(m, 1).expand(m, n),
    "nearly dependent": lambda m, n: draw(m, 1) + 1e-14 * draw(m, n, seed=2),
    "graded": lambda m, n: draw(m, n) * torch.logspace(0, -30, n, dtype=torch.float64),
    "tiny": lambda m, n: 1e-200 * draw(m, n),
    "a zero column": lambda m, n: draw(m, n) * (torch.arange(n) != n // 2),
}


@pytest.mark.parametrize("kind", HARD)
@pytest.mark.parametrize(("m", "n"), [(7, 5), (7, 1), (5, 5), (1, 1)])
def test_orthonormalise_spans_the_columns_whatever_their_rank(kind: str, m: int, n: int):
    matrix = HARD[kind](m, n)
    Q = linalg.orthonormalise(matrix)
    assert Q.shape == (m, n) and Q.is_contiguous() and identity_error(Q) < 1e-13
    outside = torch.linalg.vector_norm(matrix - Q @ (Q.mT @ matrix), dim=0)
    assert bool((outside <= 1e-13 * torch.linalg.vector_norm(matrix, dim=0)).all())


def test_orthonormalise_takes_batches():
    matrices = draw(2, 3, 7, 5)
    matrices[1, 1] = 0
    Q = linalg.orthonormalise(matrices)
    assert identity_error(Q) < 1e-13
    torch.testing.assert_close(Q @ (Q.mT @ matrices), matrices, atol=1e-12, rtol=0)


@pytest.mark.parametrize("kind", [*HARD, "in the span", "one in the span"])
@pytest.mark.parametrize("count", [1, 2, 3, 9])
@pytest.mark.parametrize("rank", [1, 4, 5, 7])
def test_complement_is_orthogonal_to_the_basis_and_holds_what_is_outside(kind: str, count: int, rank: int):
    basis = torch.linalg.qr(draw(7, rank, seed=3))[0]
    inside = basis @ draw(rank, 3)
    matrix = inside if "span" in kind else HARD[kind](7, 3)
    if kind == "one in the span":
        matrix = torch.cat([inside[:, :1], draw(7, 2)], -1)
    ways = linalg.complement(basis, matrix, count)
    wanted = min(count, 3, 7 - rank)
    assert ways.shape == (7, wanted) and ways.is_contiguous()
    both = torch.cat([basis, ways], -1)
    assert identity_error(both) < 1e-13
    used = matrix[:, :wanted]
    torch.testing.assert_close(both @ (both.mT @ used), used, atol=1e-13, rtol=0)


def test_complement_takes_batches():
    basis = torch.linalg.qr(draw(3, 7, 2))[0]
    ways = linalg.complement(basis, draw(3, 7, 4, seed=2), 3)
    assert ways.shape == (3, 7, 3) and identity_error(torch.cat([basis, ways], -1)) < 1e-13


def test_random_orthonormal_comes_from_its_generator_alone():
    like, before = torch.empty(0, dtype=torch.bfloat16), torch.get_rng_state()
    first, second, other = (
        linalg.random_orthonormal((7, 3), generator=torch.Generator().manual_seed(seed), like=like)
        for seed in (1, 1, 2)
    )
    assert torch.equal(first, second) and not torch.equal(first, other)
    assert first.dtype == torch.float32 and identity_error(first.double()) < 1e-6
    assert torch.equal(before, torch.get_rng_state())


def test_random_orthonormal_has_no_preferred_direction():
    generator, like = torch.Generator().manual_seed(0), torch.empty(0, dtype=torch.float64)
    draws = torch.stack([linalg.random_orthonormal((3, 2), generator=generator, like=like) for _ in range(4000)])
    # Under Haar's measure entries have mean 0 and variance 1/3: four standard errors of the mean are 0.037.
    assert float(draws.mean(0).abs().max()) < 0.037
    torch.testing.assert_close(draws.square().mean(0), torch.full((3, 2), 1 / 3).double(), atol=0.03, rtol=0)


# --- spectra -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("size", [1e-42, 1e-25, 1.0, 1e25])
def test_row_norms_neither_underflow_nor_overflow(dtype: torch.dtype, size: float):
    matrix = (draw(2, 7, 5) * size).to(dtype)
    expected = torch.linalg.vector_norm(matrix.double(), dim=-1)
    norms = linalg.row_norms(matrix)
    assert norms.dtype == torch.float32 and norms.shape == (2, 7)
    torch.testing.assert_close(norms.double(), expected, rtol=1e-5 if size > 1e-38 else 0.01, atol=0)


def test_row_norms_of_zero_rows_are_zero():
    assert linalg.row_norms(torch.zeros(3, 4)).tolist() == [0, 0, 0]


@pytest.mark.parametrize("scale", [1e-30, 1.0, 1e30])
def test_tails_are_truncation_errors(scale: float):
    sigma = torch.tensor([3.0, 2.0, 0.5, 1e-3, 0.0])
    expected = [scale * float(sigma.double()[r:].norm()) for r in range(6)]
    torch.testing.assert_close(linalg.tails(scale * sigma).double(), torch.tensor(expected).double(), rtol=1e-6, atol=0)


def test_tails_take_batches_and_zero_and_half_precision():
    sigma = draw(2, 3, 5).abs().sort(-1, descending=True).values
    expected = torch.stack([torch.linalg.vector_norm(sigma[..., r:], dim=-1) for r in range(6)], -1)
    torch.testing.assert_close(linalg.tails(sigma), expected)
    assert linalg.tails(torch.zeros(4)).tolist() == [0] * 5
    assert linalg.tails(sigma.bfloat16()).dtype == torch.float32


@pytest.mark.parametrize("tolerance", [0.0, 1.1e-3, 0.3, 0.51, 2.5, 99.0])
def test_rank_for_tail_is_the_smallest_rank_within_the_tolerance(tolerance: float):
    sigma = torch.tensor([3.0, 2.0, 0.5, 1e-3, 0.0])
    within = [rank for rank in range(6) if float(sigma[rank:].norm()) <= tolerance]
    assert linalg.rank_for_tail(sigma, tolerance) == min(within)


# --- polar factors -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", SHAPES)
def test_polar_is_the_nearest_orthogonal_matrix(shape: tuple[int, ...]):
    matrix = draw(*shape)
    U, _, Vh = torch.linalg.svd(matrix, full_matrices=False)
    torch.testing.assert_close(linalg.polar(matrix), U @ Vh, atol=1e-12, rtol=0)


@pytest.mark.parametrize("shape", [(7, 5), (5, 7)])
def test_polar_leaves_null_directions_at_zero(shape: tuple[int, int]):
    matrix = spectrum_matrix([2.0, 1e-3], *shape)
    factor = linalg.polar(matrix)
    torch.testing.assert_close(torch.linalg.svdvals(factor), torch.tensor([1, 1, 0, 0, 0]).double())
    assert float((factor @ factor.mT @ matrix - matrix).abs().max()) < 1e-12
    assert float(linalg.polar(torch.zeros(shape)).abs().max()) == 0


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("scale", [1e-30, 1.0, 1e30])
@pytest.mark.parametrize("shape", [(7, 5), (5, 7), (6, 6), (5, 1), (3, 7, 5)])
def test_newton_schulz_is_close_to_the_polar_factor(shape: tuple[int, ...], scale: float, dtype: torch.dtype):
    U, sigma, Vh = torch.linalg.svd(draw(*shape), full_matrices=False)
    matrix = (U @ torch.diag_embed(sigma + 0.1 * sigma.amax()) @ Vh * scale).to(dtype)
    factor = linalg.newton_schulz(matrix)
    assert factor.dtype == linalg.widen(matrix).dtype and factor.is_contiguous()
    values = torch.linalg.svdvals(factor)
    assert float(values.min()) > 0.6 and float(values.max()) < 1.3
    # It shares the singular vectors: U^T factor V is diagonal.
    inner = U.mT @ factor.double() @ Vh.mT
    off = inner - torch.diag_embed(inner.diagonal(dim1=-2, dim2=-1))
    assert float(off.abs().max()) < (0.05 if dtype == torch.bfloat16 else 1e-4)


@pytest.mark.parametrize("shape", [(3, 40), (40, 3), (1, 9), (2, 4, 30), (5, 10), (5, 9)])
def test_long_matrices_are_iterated_on_as_short_ones(monkeypatch, shape):
    monkeypatch.setattr(linalg, "LONG", 1)
    matrix = draw(*shape)
    X = matrix / torch.linalg.matrix_norm(matrix, keepdim=True)
    for _ in range(5):
        X = 3.4445 * X - 4.7750 * X @ X.mT @ X + 2.0315 * X @ X.mT @ X @ X.mT @ X
    torch.testing.assert_close(linalg.newton_schulz(matrix), X, atol=1e-11, rtol=0)


@pytest.mark.parametrize("columns", [5, 50])
def test_newton_schulz_leaves_zero_and_rounding_noise_small(monkeypatch, columns):
    monkeypatch.setattr(linalg, "LONG", 1)
    assert float(linalg.newton_schulz(torch.zeros(columns, 3)).abs().max()) == 0
    values = torch.linalg.svdvals(linalg.newton_schulz(spectrum_matrix([1.0, 1e-7], columns, 4).float()))
    assert float(values[0]) > 0.6 and float(values[1]) < 1e-3
    values = torch.linalg.svdvals(linalg.newton_schulz(spectrum_matrix([1.0, 1e-7], 7, 5)))
    assert float(values[0]) > 0.6 and float(values[1]) < 1e-4


# --- every function ----------------------------------------------------------------------------------------------

FUNCTIONS = {
    "svd": linalg.svd,
    "orthonormalise": linalg.orthonormalise,
    "complement": lambda matrix: linalg.complement(torch.eye(7, 2, dtype=matrix.dtype), matrix, 3),
    "row_norms": linalg.row_norms,
    "polar": linalg.polar,
    "newton_schulz": linalg.newton_schulz,
}


@pytest.mark.parametrize("name", FUNCTIONS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
def test_results_are_at_least_float32_contiguous_and_without_randomness(name: str, dtype: torch.dtype):
    matrix, before = draw(7, 5).to(dtype), torch.get_rng_state()
    kept = matrix.clone()
    strided = matrix.mT.contiguous().mT  # the same values, other strides
    first, second = FUNCTIONS[name](matrix), FUNCTIONS[name](strided)
    for one, other in zip(*(r if isinstance(r, tuple) else (r,) for r in (first, second)), strict=True):
        assert one.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
        assert one.is_contiguous() and other.is_contiguous()
        torch.testing.assert_close(one, other)
    assert torch.equal(matrix, kept) and torch.equal(before, torch.get_rng_state())


@pytest.mark.parametrize("shape", [(7, 1), (9, 4), (6, 6), (3, 8, 5)])
def test_gram_qr_is_a_qr_whose_orthonormal_factor_is_not_formed(shape):
    matrix = draw(*shape) * torch.logspace(0, -9, shape[-1], dtype=torch.float64)  # lengths do not matter
    matrix[..., : shape[-1], :] += 3 * torch.eye(shape[-1], dtype=torch.float64) * matrix.norm(dim=-2, keepdim=True)
    unit, T, R = linalg.gram_qr(matrix)
    Q = unit @ T
    eye = torch.eye(shape[-1], dtype=torch.float64).expand(*shape[:-2], -1, -1)
    torch.testing.assert_close(Q.mT @ Q, eye, atol=1e-13, rtol=0)
    torch.testing.assert_close(Q @ R, matrix, atol=0, rtol=1e-12)
    torch.testing.assert_close(R, R.triu(), atol=0, rtol=0)


def test_gram_qr_refuses_what_it_cannot_do_well_and_damping_makes_it_bounded():
    matrix = draw(8, 3)
    matrix[:, 2] = matrix[:, 1] + 1e-3 * matrix[:, 0]
    assert linalg.gram_qr(matrix) is None
    unit, T, R = linalg.gram_qr(torch.cat([matrix, torch.zeros(8, 1, dtype=torch.float64)], 1), damping=1e-6)
    assert float(torch.linalg.svdvals(unit @ T).max()) <= 1 + 1e-12
    torch.testing.assert_close((unit @ T @ R)[:, :3], matrix, atol=1e-12, rtol=0)


@pytest.mark.parametrize("shape", [(256, 300), (300, 256)])
def test_large_matrices_are_orthogonalised_in_half_precision_as_well(shape):
    matrix = draw(*shape).float()
    turned = linalg.newton_schulz(matrix)
    U, _, V = linalg.svd(matrix)
    core = U.mT @ turned @ V
    assert turned.dtype == torch.float32
    assert float(core.diagonal()[:240].min()) > 0.6 and float(core.diagonal().max()) < 1.3
    assert float((core - core.diagonal().diag()).norm()) < 0.05 * float(core.norm())
