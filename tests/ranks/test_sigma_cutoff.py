"""What lies below a fraction of the largest goes, never more than a part of what there is at once."""

import pytest
import torch
from torch import Tensor

from dynarank.ranks.base import Decision, LayerSpectrum, PlanContext
from dynarank.ranks.sigma_cutoff import SigmaCutoff

CONTEXT = PlanContext(0, 0, 0)


def decide(policy: SigmaCutoff, sigma: Tensor, *, kept: int | None = None) -> Decision:
    return policy.plan([LayerSpectrum("layer", sigma.double(), (90, 70), kept=kept)], CONTEXT)[0]


@pytest.mark.parametrize("beta", [0.01, 0.15, 0.5, 0.9])
@pytest.mark.parametrize("decay", [0.5, 0.9, 0.99])
@pytest.mark.parametrize("scale", [1e-150, 1.0, 1e6])
def test_the_rank_is_the_first_below_the_cutoff(beta: float, decay: float, scale: float):
    sigma = scale * decay ** torch.arange(40, dtype=torch.float64)
    below = [i for i in range(40) if decay**i < beta * (1 - 1e-12)]
    decision = decide(SigmaCutoff(beta, largest_cut=1.0), sigma)
    assert decision.rank == (below[0] if below else 40)
    assert decision.candidates == 0 and f"{beta:g}" in decision.reason


def test_a_value_at_the_cutoff_stays():
    assert decide(SigmaCutoff(0.25, largest_cut=1.0), torch.tensor([8.0, 2.0, 1.9])).rank == 2


@pytest.mark.parametrize("largest_cut", [0.1, 0.25, 0.5, 0.9, 1.0])
@pytest.mark.parametrize("present", [1, 2, 3, 5, 10, 40])
def test_one_event_takes_away_no_more_than_the_part_rounded_up(largest_cut: float, present: int):
    sigma = torch.full((present,), 1e-6)
    sigma[0] = 1.0
    rank = decide(SigmaCutoff(0.15, largest_cut=largest_cut), sigma).rank
    most = -(-round(largest_cut * present * 1000) // 1000)  # rounded up
    assert rank == max(1, present - most)
    assert present == 1 or rank < present, "no rank is stuck above the cutoff"


def test_events_halve_a_layer_until_the_cutoff_is_reached():
    sigma = torch.tensor([1.0] * 5 + [1e-3] * 65)
    ranks, reasons = [], []
    for _ in range(6):
        decision = decide(SigmaCutoff(), sigma)
        ranks.append(decision.rank)
        reasons.append(decision.reason)
        sigma = sigma[: decision.rank]
    assert ranks == [35, 17, 8, 5, 5, 5]
    assert reasons[:3] == ["on the way to 5"] * 3 and reasons[3] == "sigma >= 0.15 of the largest"


def test_candidates_that_fail_are_no_cut():
    sigma = torch.tensor([1.0] * 8 + [1e-3] * 8)
    assert decide(SigmaCutoff(), sigma, kept=8).rank == 8
    assert decide(SigmaCutoff(), torch.tensor([1.0] + [1e-3] * 15), kept=8).rank == 4


def test_the_floor_is_absolute():
    sigma = torch.tensor([1.0] + [1e-3] * 30)
    assert decide(SigmaCutoff(largest_cut=1.0, min_rank=6), sigma).rank == 6
    assert decide(SigmaCutoff(largest_cut=1.0, min_rank=6), sigma[:4]).rank == 4


def test_a_fresh_square_layer_is_cut_and_a_flat_one_is_not():
    """A random square matrix has singular values near 2 sin(t / 2), with t even in (0, pi)."""
    torch.manual_seed(0)
    square, flat = (torch.linalg.svdvals(torch.nn.Linear(n, m).weight.detach()) for m, n in ((300, 300), (600, 150)))
    for beta in (0.15, 0.3):
        found = SigmaCutoff(beta).plan([LayerSpectrum("square", square.double(), (300, 300))], CONTEXT)[0].rank
        grid = (torch.arange(10_000, dtype=torch.float64) + 0.5) / 10_000 * torch.pi / 2
        share = float((torch.cos(grid).square() * (torch.sin(grid) >= beta)).sum() / torch.cos(grid).square().sum())
        assert found == pytest.approx(300 * share, abs=6)  # the quarter-circle law: density sqrt(1 - x^2)
        found = SigmaCutoff(beta).plan([LayerSpectrum("flat", flat.double(), (600, 150))], CONTEXT)[0].rank
        assert found == 150
