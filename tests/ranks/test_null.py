"""Where there is nothing but noise, no rank grows: run on every policy that discovery finds."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from dynarank import cost
from dynarank._discovery import discover
from dynarank.ranks.absolute_tail import AbsoluteTail
from dynarank.ranks.base import AbstractRankPolicy, LayerSpectrum, PlanContext
from dynarank.ranks.estimated_noise_edge import EstimatedNoiseEdge
from dynarank.ranks.noise_edge import NoiseEdge
from dynarank.ranks.sigma_cutoff import SigmaCutoff
from dynarank.ranks.signal_energy import SignalEnergy

POLICIES = discover("dynarank.ranks", AbstractRankPolicy)
SHAPES = [(48, 64), (64, 48), (16, 150), (64, 576)]  # linear layers and unfoldings of convolutions
STARTS = [2, 5, 14]
TAKES_NOISE = {
    "absolute_tail": "is told the noise level; noise above it is signal",
    "relative_tail": "keeps a share of the norm, whatever that is made of",
    "retained_energy": "keeps a share of the energy, whatever that is made of",
    "scaled_stable_rank": "gives a random matrix full rank by construction",
    "variance_ratio": "explains the unevenness of a spectrum, whatever that is made of, and never shrinks",
}
MEANINGLESS = {
    "budget": "spends what it is given",
    "energy_per_parameter": "spends what it is given",
    "fixed": "never changes a rank",
    "fraction": "keeps a part of full rank, whatever the spectrum",
    "sigma_cutoff": "never grows unless it is told to, and keeps all that is near the largest",
}
HOLDING = sorted(POLICIES.keys() - TAKES_NOISE.keys() - MEANINGLESS.keys())
Build = Callable[[str], AbstractRankPolicy]


def fresh_weight(shape: tuple[int, int], *, seed: int = 0) -> Tensor:
    torch.manual_seed(seed)
    return nn.Linear(shape[1], shape[0]).weight.detach().double()


@pytest.mark.parametrize("name", HOLDING)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("noise", [0.1, 0.5, 1.0])
def test_noisy_targets_leave_no_direction(name: str, shape: Any, noise: float, policy_of, weight_of, arrives_at):
    for start in STARTS:
        assert arrives_at(policy_of(name), weight_of(0, noise, shape), start=start) == 1


@pytest.mark.parametrize("name", HOLDING)
@pytest.mark.parametrize("shape", SHAPES)
def test_an_untrained_layer_is_noise(name: str, shape: Any, policy_of):
    sigma = torch.linalg.svdvals(fresh_weight(shape))
    for seen in (*STARTS, len(sigma)):
        spectrum = LayerSpectrum("fresh", sigma[:seen], shape)
        rank = policy_of(name).plan([spectrum], PlanContext(0, cost.dense_parameters(*shape), 0))[0].rank
        assert rank <= 2, "the largest of a small matrix fluctuates around the edge"


@pytest.mark.parametrize(
    ("policy", "noise", "start"),
    [(NoiseEdge(), 0.1, 14), (NoiseEdge(), 1.0, 2)]
    + [(EstimatedNoiseEdge(), noise, start) for noise in (0.1, 1.0, 3.0) for start in (2, 14)]
    + [(SignalEnergy(), 0.1, 2), (SignalEnergy(), 3.0, 14)],
    ids=lambda value: type(value).__name__ if isinstance(value, AbstractRankPolicy) else None,
)
def test_no_rank_grows_in_training(policy: AbstractRankPolicy, noise: float, start: int, trains_to):
    assert trains_to(policy, 0, noise, start=start) == 1


# --- what the others do, as they say -----------------------------------------------------------------------------


@pytest.mark.parametrize("name", sorted(TAKES_NOISE))
@pytest.mark.parametrize("shape", SHAPES)
def test_the_others_take_noise_for_signal(name: str, shape: Any, policy_of: Build, weight_of, arrives_at):
    assert arrives_at(policy_of(name), weight_of(0, 1.0, shape), start=5) > 0.75 * min(shape)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("noise", [0.1, 1.0])
def test_a_share_of_the_largest_is_noise_too(shape: Any, noise: float, weight_of, arrives_at):
    assert arrives_at(SigmaCutoff(growth=0.5), weight_of(0, noise, shape), start=5) > 0.75 * min(shape)
    assert arrives_at(SigmaCutoff(), weight_of(0, noise, shape), start=5) == 5


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("noise", [0.1, 1.0])
def test_an_absolute_tolerance_as_large_as_the_noise_keeps_it_out(shape: Any, noise: float, weight_of, arrives_at):
    W = weight_of(0, noise, shape)
    assert arrives_at(AbsoluteTail(1.01 * float(W.norm())), W, start=14) == 1


@pytest.mark.parametrize("name", ["budget", "energy_per_parameter"])
@pytest.mark.parametrize("shape", SHAPES)
def test_a_budget_is_spent_on_noise_too(name: str, shape: Any, policy_of: Build, weight_of, arrives_at):
    rank = arrives_at(policy_of(name), weight_of(0, 1.0, shape), start=2)
    assert cost.factor_parameters(*shape, rank) <= 0.5 * cost.dense_parameters(*shape)
    assert cost.factor_parameters(*shape, rank + 1) > 0.5 * cost.dense_parameters(*shape)


@pytest.mark.parametrize("shape", SHAPES)
def test_noise_above_the_fresh_edge_needs_a_larger_factor(shape: Any, weight_of, arrives_at):
    W = weight_of(0, 4.0, shape)
    for policy, told in ((NoiseEdge(), NoiseEdge(factor=1.1)), (EstimatedNoiseEdge(), EstimatedNoiseEdge(factor=1.1))):
        assert arrives_at(policy, W, start=5) > arrives_at(told, W, start=5) == 1


def test_every_exception_is_a_policy():
    assert TAKES_NOISE.keys() | MEANINGLESS.keys() <= POLICIES.keys()
