"""Singular values, what they are told by, and the singular values of noise."""

import math

import pytest
import torch

from dynarank.analysis.spectra import (
    POINTS,
    describe,
    fit_noise,
    noise_curve,
    singular_values,
    thinned,
    truncation_errors,
)

SHAPES = [(7, 5), (5, 7), (6, 6), (1, 9), (9, 1)]


def randn(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, dtype=torch.float64)


@pytest.mark.parametrize("shape", SHAPES)
def test_singular_values_are_those_of_the_svd(shape):
    W = randn(*shape)
    torch.testing.assert_close(singular_values(W), torch.linalg.svdvals(W), atol=1e-12, rtol=1e-12)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_every_floating_dtype_is_widened(dtype):
    W = randn(7, 5).to(dtype)
    torch.testing.assert_close(singular_values(W), torch.linalg.svdvals(W.double()), atol=1e-12, rtol=1e-12)


def test_a_convolution_is_outputs_by_everything_else():
    W = randn(5, 3, 2, 2)
    torch.testing.assert_close(singular_values(W), torch.linalg.svdvals(W.reshape(5, 12)), atol=1e-12, rtol=1e-12)


@pytest.mark.parametrize("scale", [1e-200, 1e200])
def test_squares_neither_overflow_nor_vanish(scale):
    W = randn(7, 5)
    torch.testing.assert_close(singular_values(scale * W) / scale, torch.linalg.svdvals(W), atol=1e-12, rtol=1e-12)


def test_blocks_add_up(monkeypatch):
    W = randn(7, 50)
    monkeypatch.setattr("dynarank.analysis.spectra.BLOCK", 20)
    torch.testing.assert_close(singular_values(W), torch.linalg.svdvals(W), atol=1e-12, rtol=1e-12)


def test_the_resolution_is_about_a_hundred_millionth_of_the_largest():
    W = randn(60, 4) @ randn(4, 40)
    sigma = singular_values(W)
    assert float(sigma[4]) < 1e-7 * float(sigma[0])


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_what_is_not_finite_is_refused(bad):
    W = randn(4, 3)
    W[1, 1] = bad
    with pytest.raises(ValueError, match="NaN or infinity"):
        singular_values(W)


@pytest.mark.parametrize("shape", SHAPES)
def test_errors_are_those_of_the_truncated_matrix(shape):
    W = randn(*shape)
    U, sigma, Vh = torch.linalg.svd(W, full_matrices=False)
    expected = [
        float((W - U[:, :r] * sigma[:r] @ Vh[:r]).square().sum() / W.square().sum()) for r in range(len(sigma) + 1)
    ]
    assert truncation_errors(singular_values(W)).tolist() == pytest.approx(expected, abs=1e-12)


@pytest.mark.parametrize("shape", SHAPES)
def test_a_description_equals_its_definitions(shape):
    W = randn(*shape)
    sigma = torch.linalg.svdvals(W)
    found = describe(singular_values(W), shape)
    energy = sigma.square().cumsum(0) / sigma.square().sum()
    p = sigma / sigma.sum()
    for name, level in (("rank_90", 0.9), ("rank_95", 0.95), ("rank_99", 0.99)):
        rank = getattr(found, name)
        assert energy[rank - 1] >= level - 1e-12
        assert rank == 1 or energy[rank - 2] < level
    assert found.stable_rank == pytest.approx(float(W.square().sum() / torch.linalg.matrix_norm(W, 2) ** 2))
    assert found.effective_rank == pytest.approx(float((-(p * p.log()).sum()).exp()))
    assert found.ranks == tuple(range(1, min(shape) + 1))
    assert found.errors[-1] == pytest.approx(0, abs=1e-12)


def test_equal_singular_values_use_every_direction():
    found = describe(singular_values(3 * torch.eye(6, 9)), (6, 9))
    assert found.stable_rank == pytest.approx(6)
    assert found.effective_rank == pytest.approx(6)
    assert found.rank_90 == 6


def test_a_weight_of_zeros_has_rank_nothing():
    found = describe(singular_values(torch.zeros(5, 7)), (5, 7))
    assert (found.rank_90, found.stable_rank, found.effective_rank, found.noise.above) == (0, 0.0, 0.0, 0)
    assert set(found.errors) == {0.0}


def test_a_long_spectrum_is_thinned_on_a_logarithmic_scale():
    found = describe(torch.linspace(2, 1, 3000, dtype=torch.float64), (3000, 3000))
    assert len(found.ranks) <= POINTS
    assert found.ranks[:8] == tuple(range(1, 9))
    assert found.ranks[-1] == 3000
    assert list(found.ranks) == sorted(set(found.ranks))


@pytest.mark.parametrize("count", [1, 2, 255, 256, 257, 100_000])
def test_thinning_keeps_the_ends(count):
    kept = thinned(count)
    assert (kept[0], kept[-1]) == (0, count - 1)
    assert len(kept) <= POINTS


# --- noise -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [(300, 200), (200, 300), (250, 250), (60, 400)])
@pytest.mark.parametrize("level", [1.0, 0.02])
def test_pure_noise_has_nothing_above_its_edge(shape, level):
    found = fit_noise(sigma := singular_values(level * randn(*shape)), shape)
    m, n = shape
    assert found.level == pytest.approx(level, rel=0.05)
    assert found.upper == pytest.approx(found.level * (math.sqrt(m) + math.sqrt(n)))
    assert found.lower == pytest.approx(found.level * abs(math.sqrt(m) - math.sqrt(n)), abs=1e-9)
    assert found.upper < found.threshold < 1.05 * found.upper
    assert float(sigma[0]) < 1.05 * found.upper
    assert found.above == 0


@pytest.mark.parametrize("rank", [1, 4, 15])
@pytest.mark.parametrize("shape", [(120, 200), (200, 120)])
def test_a_planted_rank_is_found(rank, shape):
    m, n = shape
    found = fit_noise(singular_values(randn(m, n) + randn(m, rank) @ randn(rank, n)), shape)
    assert found.above == rank


def test_a_weight_of_low_rank_has_no_bulk_and_all_its_directions_count():
    found = fit_noise(singular_values(randn(30, 4) @ randn(4, 50)), (30, 50))
    assert (found.level, found.upper, found.above) == (0.0, 0.0, 4)


@pytest.mark.parametrize("shape", [(300, 200), (200, 200)])
def test_the_curve_of_the_noise_follows_a_random_matrix(shape):
    sigma = torch.linalg.svdvals(randn(*shape))
    curve = noise_curve(shape, 1.0, range(1, 201))
    assert float((sigma - curve).abs().max() / sigma[0]) < 0.03


@pytest.mark.parametrize("aspect", [0.2, 0.7, 1.0])
def test_the_curve_is_the_quantile_of_the_density(aspect):
    n = 1000
    k = round(aspect * n)
    low, high = (1 - math.sqrt(aspect)) ** 2, (1 + math.sqrt(aspect)) ** 2
    x = torch.linspace(low, high, 400_001, dtype=torch.float64)[1:-1]
    density = ((high - x) * (x - low)).sqrt() / (2 * math.pi * aspect * x)
    mass = density.flip(0).cumsum(0).flip(0) * (x[1] - x[0])
    middle = math.sqrt(n * float(x[(mass > (0.3 * k - 0.5) / k).sum()]))
    assert float(noise_curve((k, n), 1.0, [0.3 * k])) == pytest.approx(middle, rel=1e-3)
