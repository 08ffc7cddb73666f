"""InRank's rule as published: against the variances themselves."""

import pytest
import torch

from dynarank.ranks.base import Decision, LayerSpectrum, PlanContext
from dynarank.ranks.variance_ratio import VarianceRatio

SHAPE = (50, 30)


def decide(policy: VarianceRatio, sigma: torch.Tensor, *, kept: int | None = None) -> Decision:
    return policy.plan([LayerSpectrum("layer", sigma.double(), SHAPE, kept=kept)], PlanContext(0, 0, 0))[0]


def published(sigma: torch.Tensor, kept: int, threshold: float) -> int:
    """The rule with the whole spectrum in hand: the first rank that explains enough, or the last of the buffer."""
    whole = torch.cat([sigma, torch.zeros(min(SHAPE) - len(sigma))]).double()
    for rank in range(kept, len(sigma)):
        cut = whole.clone()
        cut[rank:] = 0
        if float(1 - torch.var(whole - cut) / torch.var(whole)) > threshold:
            return rank
    return max(kept, len(sigma) - 1)


@pytest.mark.parametrize("explained", [0.5, 0.9, 0.99])
@pytest.mark.parametrize("kept", [2, 5, 12])
@pytest.mark.parametrize("buffer", [1, 4, 18])
@pytest.mark.parametrize("decay", [0.3, 0.8, 0.97])
def test_the_rank_is_that_of_the_published_loop(explained: float, kept: int, buffer: int, decay: float):
    sigma = decay ** torch.arange(kept + buffer, dtype=torch.float64)
    decision = decide(VarianceRatio(explained, buffer=buffer), sigma, kept=kept)
    assert decision.rank == published(sigma, kept, explained)
    assert decision.candidates == min(buffer, 30 - decision.rank)
    assert decision == decide(VarianceRatio(explained, buffer=buffer), 1e-120 * sigma, kept=kept)


def test_it_never_shrinks_and_starts_at_its_smallest_rank():
    sigma = torch.tensor([1.0] + [1e-6] * 20)
    assert decide(VarianceRatio(buffer=5), sigma[:15], kept=10).rank == 10
    assert decide(VarianceRatio(buffer=5), sigma[:15]).rank == 2
    assert decide(VarianceRatio(buffer=5, min_rank=1), sigma[:15]).rank == 1


def test_one_event_grows_by_less_than_the_buffer():
    flat = 1 - 0.1 * torch.arange(12) / 12
    assert decide(VarianceRatio(buffer=10), flat, kept=2).rank == 11


def test_what_it_explains_is_unevenness_and_not_energy():
    nearly_flat = torch.cat([torch.ones(29), torch.tensor([0.999])])
    assert VarianceRatio().ratio(nearly_flat, 15, 30) < -100, "half of the energy, and worse than nothing"
    one_large = torch.cat([torch.tensor([10.0]), torch.full((29,), 3.0)])
    assert VarianceRatio().ratio(one_large, 29, 30) > 0.8 > 100 / float(one_large.square().sum())
