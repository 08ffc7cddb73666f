"""A share of the energy above the noise, where another policy says what noise is."""

from collections.abc import Sequence
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor

from dynarank.ranks.base import AbstractRankPolicy, Decision, LayerSpectrum, PlanContext
from dynarank.ranks.signal_energy import SignalEnergy

CONTEXT = PlanContext(0, 0, 0)


@dataclass(frozen=True)
class Signals(AbstractRankPolicy):
    count: int
    tried: int = 4

    def plan(self, spectra: Sequence[LayerSpectrum], context: PlanContext) -> list[Decision]:
        return [Decision(min(self.count, len(s.sigma)), self.tried, "above noise") for s in spectra]


def decide(sigma: Tensor, signals: int, explained: float) -> Decision:
    layer = LayerSpectrum("layer", sigma.double(), (64, 48))
    return SignalEnergy(Signals(signals), explained).plan([layer], CONTEXT)[0]


@pytest.mark.parametrize("signals", [1, 3, 7, 12])
@pytest.mark.parametrize("explained", [0.3, 0.9, 0.99])
@pytest.mark.parametrize("decay", [0.4, 0.8, 0.97])
@pytest.mark.parametrize("scale", [1e-180, 1.0, 1e6])
def test_the_rank_is_the_smallest_with_the_share(signals: int, explained: float, decay: float, scale: float):
    values = [decay**i for i in range(12)]
    noise = values[signals] ** 2 if signals < 12 else 0.0
    excess = [value**2 - noise for value in values[:signals]]
    rank = next(r for r in range(1, signals + 1) if sum(excess[:r]) >= explained * sum(excess) * (1 - 1e-12))
    decision = decide(scale * torch.tensor(values, dtype=torch.float64), signals, explained)
    assert decision.rank == rank and decision.candidates == 4
    assert decision.reason == f"{explained:g} of the energy above noise"


def test_directions_at_the_level_of_the_noise_explain_nothing():
    sigma = torch.tensor([5.0, 4.0, 1.001, 1.001, 1.0, 1.0, 1.0])
    assert decide(sigma, 4, 0.99).rank == 2
    assert decide(sigma, 7, 0.99).rank == 7, "unless all of it is signal"


@pytest.mark.parametrize("count", [1, 3, 6])
def test_a_flat_spectrum_stays_as_the_policy_wants_it(count: int):
    for sigma in (torch.ones(6), torch.zeros(6)):
        found = decide(sigma, count, 0.9)
        assert found.rank == (6 if count == 6 and sigma.any() else count)


def test_equal_directions_without_noise_count_by_the_share():
    assert [decide(torch.ones(40), 40, explained).rank for explained in (0.5, 0.9, 0.99)] == [20, 36, 40]


def test_what_is_no_policy_is_named():
    with pytest.raises(TypeError, match="SignalEnergy: policy must be an instance of a rank policy, got 'budget'"):
        SignalEnergy("budget")  # type: ignore[arg-type]
