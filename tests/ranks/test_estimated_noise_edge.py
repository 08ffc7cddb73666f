"""The level of the noise is read off the weakest directions, whatever it is and however much of it is visible."""

import pytest
import torch
from torch import Tensor

from dynarank.ranks._marchenko_pastur import edge, spectrum
from dynarank.ranks.base import Decision, LayerSpectrum, PlanContext
from dynarank.ranks.estimated_noise_edge import EstimatedNoiseEdge
from dynarank.ranks.noise_edge import NoiseEdge

SHAPES = [(60, 80), (80, 60), (16, 150), (64, 576), (300, 40)]


def noise(shape: tuple[int, int], *, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def decide(policy: EstimatedNoiseEdge, sigma: Tensor, shape: tuple[int, int], *, step: int = 1000) -> Decision:
    return policy.plan([LayerSpectrum("layer", sigma, shape)], PlanContext(step, 0, 0))[0]


@pytest.mark.parametrize("shape", [*SHAPES, (200, 200)])
def test_the_expected_spectrum_is_that_of_random_matrices(shape: tuple[int, int]):
    drawn = torch.stack([torch.linalg.svdvals(noise(shape, seed=seed)) for seed in range(40)]).mean(0)
    expected = spectrum(*shape)
    assert expected.shape == (min(shape),) and bool((expected.diff() < 0).all())
    assert float(expected[0]) < edge(*shape)
    torch.testing.assert_close(expected, drawn, atol=0.02 * edge(*shape), rtol=0)
    assert float(expected.square().sum()) == pytest.approx(shape[0] * shape[1], rel=0.02), "the energy of the noise"


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("level", [1e-6, 1.0, 1e4])
@pytest.mark.parametrize("planted", [1, 4, 9])
@pytest.mark.parametrize("visible", [4, 7, "all"])
def test_signal_is_told_from_the_noise_beside_it_at_any_level(shape, level, planted, visible):
    U, V = (torch.linalg.qr(noise((size, planted), seed=size))[0] for size in shape)
    W = level * (noise(shape) + 4 * edge(*shape) * U @ V.mT)
    sigma = torch.linalg.svdvals(W)
    seen = len(sigma) if visible == "all" else planted + visible
    assert EstimatedNoiseEdge().signals(sigma[:seen], shape) == planted


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("visible", [1, 4, 5, 12, "all"])
def test_noise_alone_shows_no_signal_at_any_level(shape, visible):
    sigma = torch.linalg.svdvals(noise(shape))
    seen = len(sigma) if visible == "all" else visible
    assert [EstimatedNoiseEdge().signals(level * sigma[:seen], shape) for level in (1e-6, 1.0, 1e6)] == [0, 0, 0]


@pytest.mark.parametrize("kept", [[5.0, 4.0], [5.0, 4.0, 3.0, 3.0]])
@pytest.mark.parametrize("step", [0, 1000])
def test_where_no_noise_is_visible_the_fresh_edge_decides(kept: list[float], step: int):
    sigma = 0.25 * torch.tensor(kept, dtype=torch.float64)
    least = NoiseEdge(factor=0.6).threshold((64, 48), step)
    decision = decide(EstimatedNoiseEdge(), sigma, (64, 48), step=step)
    assert decision.rank == max(1, int((sigma > least).sum()))
    assert f"{least:.3g}" in decision.reason


def test_candidates_that_are_all_signal_look_like_noise_unless_they_are_large():
    kept, shape = [8.0, 8.0], (64, 48)
    for candidates, rank in ((0.3, 2), (1.0, 10)):
        sigma = torch.tensor(kept + 8 * [candidates], dtype=torch.float64)
        assert decide(EstimatedNoiseEdge(), sigma, shape).rank == rank


def test_there_are_always_probes_unless_nothing_grows():
    sigma = torch.tensor([8.0, 8.0, 0.1, 0.1, 0.1, 0.1], dtype=torch.float64)
    assert decide(EstimatedNoiseEdge(), sigma, (64, 48)) == Decision(2, 8, "above noise 0.746")
    assert decide(EstimatedNoiseEdge(probes=1), sigma, (64, 48)).candidates == 2
    assert decide(EstimatedNoiseEdge(), sigma, (64, 7)).candidates == 5, "no more than fit"
    assert decide(EstimatedNoiseEdge(growth=0.0), sigma, (64, 48)).candidates == 0


def test_the_reason_says_which_edge_decided():
    sigma = torch.tensor([0.4, 0.4, 0.01, 0.01, 0.01, 0.01], dtype=torch.float64)
    assert decide(EstimatedNoiseEdge(), sigma, (64, 48)).reason == "above the noise it shows"
    assert decide(EstimatedNoiseEdge(), 10 * sigma, (64, 48)).reason.startswith("above noise 0.")
