"""Measures of a matrix and of two, against plain dense computations."""

import math

import pytest
import torch
from torch import Tensor

from dynarank import linalg
from dynarank.analysis.spectra import describe, fit_noise, singular_values
from dynarank.cost import break_even_rank
from dynarank.stability import (
    bulk,
    change,
    directions,
    effective_rank,
    overlap,
    retained_energy,
    stability,
    stable_rank,
)
from dynarank.stability.look import SHOWN, compare
from dynarank.switches.stable_basis import StableBasis

SHAPES = [(7, 5), (5, 7), (6, 6), (1, 9), (9, 1)]
RANK_DEFICIENT = [(9, 6, 2), (6, 9, 2), (7, 7, 1)]


def randn(*shape: int) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64)


def orthogonal(size: int) -> Tensor:
    return torch.linalg.qr(randn(size, size))[0]


def near(W: Tensor, size: float = 0.3) -> Tensor:
    return W + size * torch.randn_like(W)


def dense_polar(W: Tensor) -> Tensor:
    """The polar factor as ``W (W^T W)^-1/2``, without an SVD of ``W``; for tall matrices of full rank."""
    eigenvalues, vectors = torch.linalg.eigh(W.mT @ W)
    return W @ vectors @ torch.diag(eigenvalues.rsqrt()) @ vectors.mT


# --- the directions of a matrix ----------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", SHAPES)
def test_directions_multiply_out_to_the_matrix(shape):
    W = randn(*shape)
    at = directions(W)
    torch.testing.assert_close(at.to_dense(), W, atol=1e-12, rtol=0)
    assert at.shape == shape and at.rank == min(shape)


def test_a_convolution_is_outputs_by_everything_else():
    W = randn(5, 3, 2, 2)
    assert directions(W).shape == (5, 12)
    torch.testing.assert_close(directions(W).to_dense(), W.reshape(5, 12), atol=1e-12, rtol=0)


@pytest.mark.parametrize(("m", "n", "rank"), RANK_DEFICIENT)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_what_is_only_rounding_is_no_direction(m, n, rank, dtype):
    at = directions(torch.randn(m, rank, dtype=dtype) @ torch.randn(rank, n, dtype=dtype))
    assert at.rank == rank and at.U.shape == (m, rank) and at.V.shape == (n, rank)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_widened(dtype):
    W = torch.randn(7, 5).to(dtype)
    at = directions(W)
    assert at.U.dtype == torch.float32
    torch.testing.assert_close(at.to_dense(), W.float(), atol=1e-5, rtol=0)


def test_directions_are_no_views_of_the_weight():
    W = torch.nn.Parameter(randn(6, 4))
    at = directions(W)
    before = at.to_dense()
    with torch.no_grad():
        W.mul_(3)
    assert torch.equal(at.to_dense(), before) and not at.U.requires_grad


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_what_is_not_finite_is_refused(bad):
    W = randn(4, 3)
    W[2, 1] = bad
    with pytest.raises(ValueError, match="NaN or infinity"):
        directions(W)


# --- stability ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [(7, 5), (6, 6), (9, 1)])
def test_stability_is_the_trace_of_the_polar_factors(shape):
    one = randn(*shape)
    other = near(one)
    expected = float((dense_polar(one).mT @ dense_polar(other)).trace()) / shape[1]
    assert stability(directions(one), directions(other)) == pytest.approx(expected, abs=1e-12)
    assert stability(directions(one.mT), directions(other.mT)) == pytest.approx(expected, abs=1e-12)


@pytest.mark.parametrize("shape", SHAPES)
def test_stability_is_the_mean_cosine_of_the_columns(shape):
    one = randn(*shape)
    other = near(one)
    E, F = (linalg.polar(W if shape[0] >= shape[1] else W.mT) for W in (one, other))
    expected = float(torch.cosine_similarity(E, F, dim=0).mean())
    assert stability(directions(one), directions(other)) == pytest.approx(expected, abs=1e-12)


def test_stability_agrees_with_the_switch():
    one = randn(8, 5)
    other = near(one, 0.5)
    S = stability(directions(one), directions(other))
    for threshold, ready in ((S - 1e-6, {"fc"}), (S + 1e-6, set())):
        switch = StableBasis(every=1, threshold=threshold)
        _, state = switch.look(0, {"fc": one}, switch.init())
        assert switch.look(1, {"fc": other}, state)[0] == ready


@pytest.mark.parametrize("shape", SHAPES)
def test_an_unmoved_or_scaled_matrix_is_at_1(shape):
    W = randn(*shape)
    assert stability(directions(W), directions(W)) == pytest.approx(1, abs=1e-14)
    assert stability(directions(W), directions(7 * W)) == pytest.approx(1, abs=1e-14)
    assert stability(directions(W), directions(-W)) == pytest.approx(-1, abs=1e-14)


def test_singular_values_alone_do_not_count():
    U, V = orthogonal(7)[:, :5], orthogonal(5)
    one, other = (U * torch.tensor(sigma) @ V.mT for sigma in ([5.0, 4, 3, 2, 1], [1.0, 9, 2, 7, 3]))
    assert stability(directions(one), directions(other)) == pytest.approx(1, abs=1e-12)


def test_signs_and_rotations_inside_equal_singular_values_do_not_count():
    U, V, sigma = orthogonal(8)[:, :5], orthogonal(6)[:, :5], torch.tensor([4.0, 2, 2, 2, 1], dtype=torch.float64)
    turn = torch.block_diag(-torch.ones(1, 1), orthogonal(3), -torch.ones(1, 1))
    one = directions(U * sigma @ V.mT)
    turned = type(one)(U @ turn, sigma, V @ turn)  # the same matrix by other singular vectors
    torch.testing.assert_close(turned.to_dense(), one.to_dense(), atol=1e-12, rtol=0)
    other = directions(near(one.to_dense()))
    assert stability(turned, other) == pytest.approx(stability(one, other), abs=1e-12)
    assert overlap(turned, other, top=4) == pytest.approx(overlap(one, other, top=4), abs=1e-12)
    assert change(turned, other) == pytest.approx(change(one, other), abs=1e-12)


def test_unrelated_matrices_are_near_0():
    values = [stability(directions(randn(60, 40)), directions(randn(60, 40))) for _ in range(5)]
    assert max(map(abs, values)) < 0.08  # the trace has mean 0 and standard deviation 1 / sqrt(60 * 40) a column


@pytest.mark.parametrize(("m", "n", "rank"), RANK_DEFICIENT)
def test_of_low_rank_the_directions_that_are_there_count(m, n, rank):
    W = randn(m, rank) @ randn(rank, n)
    other = randn(m, rank) @ randn(rank, n)
    assert stability(directions(W), directions(W)) == pytest.approx(1, abs=1e-12)
    expected = float((linalg.polar(W) * linalg.polar(other)).sum()) / rank
    assert stability(directions(W), directions(other)) == pytest.approx(expected, abs=1e-12)


def test_a_cut_or_a_new_direction_alone_is_no_turn():
    U, V = orthogonal(8), orthogonal(6)
    four, two = ((U[:, :r] * torch.arange(r, 0, -1)) @ V[:, :r].mT for r in (4, 2))
    assert stability(directions(four), directions(two)) == pytest.approx(1, abs=1e-12)
    assert stability(directions(two), directions(four)) == pytest.approx(1, abs=1e-12)
    other = (U[:, 2:4] * torch.tensor([2.0, 1.0])) @ V[:, 2:4].mT
    assert stability(directions(two), directions(other)) == pytest.approx(0, abs=1e-12)


def test_rounding_never_lifts_stability_or_overlap_above_1():
    for seed in range(20):
        W = torch.randn(40, 30, generator=torch.Generator().manual_seed(seed))
        assert stability(directions(W), directions(W)) <= 1 and overlap(directions(W), directions(W)) <= 1


# --- overlap and change ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [(7, 5), (5, 7), (6, 6)])
@pytest.mark.parametrize("top", [1, 3, 5, 20])
def test_overlap_is_that_of_the_projections_on_the_leading_directions(shape, top):
    one = randn(*shape)
    other = near(one)
    k = min(top, *shape)
    projections = []
    for W in (one, other):
        gram = W @ W.mT if shape[0] >= shape[1] else W.mT @ W
        leading = torch.linalg.eigh(gram)[1][:, -k:]
        projections.append(leading @ leading.mT)
    expected = float((projections[0] @ projections[1]).trace()) / k
    assert overlap(directions(one), directions(other), top=top) == pytest.approx(expected, abs=1e-10)


def test_weak_directions_that_turn_leave_the_overlap_and_not_the_stability():
    U, V, sigma = orthogonal(9), orthogonal(6), torch.tensor([9.0, 8, 7, 1e-3, 1e-3, 1e-3], dtype=torch.float64)
    one = U[:, :6] * sigma @ V.mT
    other = one.clone()
    other[:, :] = (U[:, [0, 1, 2, 6, 7, 8]] * sigma) @ V.mT
    assert stability(directions(one), directions(other)) == pytest.approx(0.5, abs=1e-9)
    assert overlap(directions(one), directions(other), top=3) == pytest.approx(1, abs=1e-9)
    assert change(directions(one), directions(other)) < 1e-3


@pytest.mark.parametrize("shape", SHAPES)
def test_change_is_the_relative_distance(shape):
    one = randn(*shape)
    other = near(one)
    expected = float(torch.linalg.norm(other - one) / torch.linalg.norm(one))
    assert change(directions(one), directions(other)) == pytest.approx(expected, rel=1e-12)


def test_a_small_change_in_float32_is_seen():
    W = torch.randn(80, 50)
    assert change(directions(W), directions(W + 1e-4 * torch.randn(80, 50))) == pytest.approx(1e-4, rel=0.05)


def test_weights_of_zeros_are_compared_too():
    zero, some = directions(torch.zeros(5, 4)), directions(torch.randn(5, 4))
    assert zero.rank == 0
    assert (stability(zero, zero), overlap(zero, zero), change(zero, zero)) == (1.0, 1.0, 0.0)
    assert (stability(zero, some), overlap(some, zero), change(zero, some)) == (0.0, 0.0, math.inf)
    assert change(some, zero) == pytest.approx(1)


@pytest.mark.parametrize("measure", [stability, overlap, change])
def test_two_shapes_are_refused(measure):
    with pytest.raises(ValueError, match=r"two matrices of one shape, got \(5, 4\) and \(4, 5\)"):
        measure(directions(randn(5, 4)), directions(randn(4, 5)))


def test_overlap_of_no_direction_is_refused():
    with pytest.raises(ValueError, match="top must be at least 1, got 0"):
        overlap(directions(randn(5, 4)), directions(randn(5, 4)), top=0)


# --- spectra -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", SHAPES)
def test_ranks_are_their_definitions(shape):
    W = randn(*shape)
    sigma = directions(W).sigma
    norm, spectral = torch.linalg.norm(W), torch.linalg.matrix_norm(W, 2)
    p = torch.linalg.svdvals(W) / torch.linalg.svdvals(W).sum()
    assert stable_rank(sigma) == pytest.approx(float(norm**2 / spectral**2), rel=1e-12)
    assert effective_rank(sigma) == pytest.approx(float(torch.exp(-(p * p.log()).sum())), rel=1e-12)
    whole = describe(singular_values(W), shape)
    assert (stable_rank(sigma), effective_rank(sigma)) == pytest.approx((whole.stable_rank, whole.effective_rank))


def test_equal_directions_count_once_each():
    W = torch.eye(7, 5, dtype=torch.float64)[:, :3] * 4
    assert stable_rank(directions(W).sigma) == pytest.approx(3)
    assert effective_rank(directions(W).sigma) == pytest.approx(3)
    nothing = directions(torch.zeros(4, 3)).sigma
    assert stable_rank(nothing) == effective_rank(nothing) == 0


@pytest.mark.parametrize("rank", [0, 1, 3, 5, 9])
def test_retained_energy_is_that_of_the_truncated_matrix(rank):
    W = randn(7, 5)
    U, sigma, Vh = torch.linalg.svd(W, full_matrices=False)
    kept = U[:, :rank] * sigma[:rank] @ Vh[:rank]
    expected = float(kept.square().sum() / W.square().sum())
    assert retained_energy(directions(W).sigma, rank) == pytest.approx(expected, abs=1e-12)
    assert retained_energy(directions(torch.zeros(4, 3)).sigma, rank) == 1


@pytest.mark.parametrize("shape", [(300, 200), (200, 300), (150, 150), (400, 20)])
@pytest.mark.parametrize("level", [0.01, 3.0])
def test_noise_is_found_to_be_noise(shape, level):
    W = level * randn(*shape)
    found = bulk(directions(W).sigma, shape)
    assert found.level == pytest.approx(level, rel=0.05)
    assert found.above(directions(W).sigma) == 0


@pytest.mark.parametrize("shape", [(300, 200), (200, 300), (150, 150)])
def test_planted_directions_above_the_noise_are_counted(shape):
    m, n = shape
    edge = math.sqrt(m) + math.sqrt(n)
    signal = (orthogonal(m)[:, :4] * torch.tensor([5.0, 4, 3, 2]) * edge) @ orthogonal(n)[:, :4].mT
    sigma = directions(randn(m, n) + signal).sigma
    assert bulk(sigma, shape).above(sigma) == 4


@pytest.mark.parametrize("shape", [(60, 40), (40, 60), (50, 50), (31, 7)])
def test_the_bulk_is_that_of_the_analysis(shape):
    sigma = singular_values(randn(*shape) + 1)
    found, known = bulk(sigma, shape), fit_noise(sigma, shape)
    assert (found.level, found.threshold, found.above(sigma)) == (known.level, known.threshold, known.above)


@pytest.mark.parametrize("shape", [(60, 40), (50, 50), (31, 7), (8, 300)])
def test_the_level_is_that_of_the_median_of_the_density(shape):
    k, n = min(shape), max(shape)
    low, high = (math.sqrt(n) - math.sqrt(k)) ** 2, (math.sqrt(n) + math.sqrt(k)) ** 2
    x = torch.linspace(low, high, 400_001, dtype=torch.float64)[1:-1]
    density = ((high - x) * (x - low)).sqrt() / x
    mass = density.flip(0).cumsum(0).flip(0) / density.sum()
    middle = math.sqrt(float(x[(mass > (k // 2 + 0.5) / k).sum()]))
    sigma = singular_values(randn(*shape))
    assert bulk(sigma, shape).level == pytest.approx(float(sigma[k // 2]) / middle, rel=2e-3)


def test_too_few_directions_show_no_noise():
    sigma = directions(randn(9, 3) @ randn(3, 8)).sigma
    found = bulk(sigma, (9, 8))
    assert found.level == 0 and found.above(sigma) is None
    assert bulk(directions(randn(9, 5) @ randn(5, 8)).sigma, (9, 8)).level > 0


# --- a look ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [(7, 5), (5, 7), (40, 90)])
def test_a_look_holds_every_measure(shape):
    one = randn(*shape)
    other = near(one)
    before, after = directions(one), directions(other)
    found = compare(before, after, top=2)
    assert found.stability == stability(before, after)
    assert found.overlap == overlap(before, after, top=2)
    assert found.change == change(before, after)
    assert (found.shape, found.rank, found.break_even) == (shape, min(shape), break_even_rank(*shape))
    assert found.retained_energy == pytest.approx(retained_energy(after.sigma, break_even_rank(*shape)))
    sigma = torch.linalg.svdvals(other)
    assert found.singular_values == pytest.approx([float(sigma[r - 1]) for r in found.positions], rel=1e-5)


def test_of_a_layer_of_low_rank_all_energy_is_within_its_rank():
    assert compare(None, directions(randn(9, 2) @ randn(2, 8))).retained_energy == pytest.approx(1)


def test_without_an_earlier_look_of_the_same_shape_nothing_is_compared():
    now = directions(randn(7, 5))
    for before in (None, directions(randn(5, 7))):
        found = compare(before, now)
        assert found.stability is found.overlap is found.change is None
        assert found.rank == 5


@pytest.mark.parametrize("count", [1, SHOWN, SHOWN + 1, 700])
def test_of_many_singular_values_some_are_kept_the_first_and_the_last_among_them(count):
    positions = compare(None, directions(torch.diag(torch.linspace(2, 1, count)))).positions
    assert len(positions) <= SHOWN and list(positions) == sorted(set(positions))
    assert (positions[0], positions[-1]) == (1, count)
