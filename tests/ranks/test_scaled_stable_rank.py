"""The scaled stable rank is the full rank of a random matrix, and falls as its spectrum decays."""

import pytest
import torch

from dynarank.ranks.base import LayerSpectrum, PlanContext
from dynarank.ranks.scaled_stable_rank import ScaledStableRank

SHAPES = [(300, 300), (400, 100), (64, 576), (576, 64), (200, 40)]


def rank_of(sigma: torch.Tensor, shape: tuple[int, int]) -> int:
    return ScaledStableRank().plan([LayerSpectrum("layer", sigma.double(), shape)], PlanContext(0, 0, 0))[0].rank


@pytest.mark.parametrize("shape", SHAPES)
def test_the_scale_is_full_rank_over_the_stable_rank_of_a_random_matrix(shape: tuple[int, int]):
    W = torch.randn(shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    stable = float(W.norm() ** 2 / torch.linalg.matrix_norm(W, 2) ** 2)
    assert ScaledStableRank().scale(shape) == pytest.approx(min(shape) / stable, rel=0.1)
    assert rank_of(torch.linalg.svdvals(W), shape) >= 0.9 * min(shape)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("decay", [0.3, 0.8, 0.95])
def test_the_rank_is_that_of_the_paper(shape: tuple[int, int], decay: float):
    sigma = decay ** torch.arange(min(shape), dtype=torch.float64)
    m, n = shape
    initial = m * n / (m**0.5 + n**0.5) ** 2
    wanted = min(shape) / initial * float(sigma.square().sum() / sigma[0] ** 2)
    found = rank_of(sigma, shape)
    assert found == min(min(shape), int(-(-wanted // 1)))
    assert found == rank_of(1e-30 * sigma, shape), "the scale of the weight does not matter"


def test_it_counts_what_the_layer_has():
    assert rank_of(torch.ones(5), (300, 300)) == 5
    assert rank_of(torch.zeros(5), (300, 300)) == 1
