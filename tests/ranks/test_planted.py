"""Planted ranks are found under noise, from below and from above: run on every policy that discovery finds."""

from typing import Any

import pytest

from dynarank._discovery import discover
from dynarank.ranks.absolute_tail import AbsoluteTail
from dynarank.ranks.base import AbstractRankPolicy
from dynarank.ranks.estimated_noise_edge import EstimatedNoiseEdge
from dynarank.ranks.noise_edge import NoiseEdge
from dynarank.ranks.scaled_stable_rank import ScaledStableRank
from dynarank.ranks.sigma_cutoff import SigmaCutoff
from dynarank.ranks.signal_energy import SignalEnergy
from dynarank.ranks.variance_ratio import VarianceRatio

POLICIES = discover("dynarank.ranks", AbstractRankPolicy)
SHAPES = [(48, 64), (64, 48), (16, 150), (64, 576)]  # linear layers and unfoldings of convolutions
STARTS = [2, 5, 14]
MEANINGLESS = {
    "absolute_tail": "is told the noise level",
    "budget": "spends what it is given",
    "energy_per_parameter": "spends what it is given",
    "fixed": "never changes a rank",
    "fraction": "keeps a part of full rank, whatever the spectrum",
    "scaled_stable_rank": "r equal directions count as a multiple of r by construction",
    "sigma_cutoff": "never grows unless it is told to",
    "variance_ratio": "never shrinks",
}
FINDING = sorted(POLICIES.keys() - MEANINGLESS.keys())


@pytest.mark.parametrize("name", FINDING)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("noise", [0.1, 0.5, 1.0])
@pytest.mark.parametrize("planted", [3, 8])
def test_the_rank_is_found(name: str, shape: Any, noise: float, planted: int, policy_of, weight_of, arrives_at):
    for start in STARTS:
        assert arrives_at(policy_of(name), weight_of(planted, noise, shape), start=start) == planted


@pytest.mark.parametrize(
    ("policy", "planted", "noise", "start"),
    [(NoiseEdge(), 3, 0.5, 14), (NoiseEdge(), 8, 0.5, 2)]
    + [(EstimatedNoiseEdge(), 3, noise, start) for noise in (0.1, 2.0) for start in (2, 14)]
    + [(EstimatedNoiseEdge(), 8, noise, start) for noise in (0.1, 2.0) for start in (2, 20)]
    + [(SignalEnergy(), 3, 1.0, 2), (SignalEnergy(), 8, 0.1, 2), (SignalEnergy(), 8, 1.0, 20)],
    ids=lambda value: type(value).__name__ if isinstance(value, AbstractRankPolicy) else None,
)
def test_the_rank_is_found_in_training(policy: AbstractRankPolicy, planted: int, noise: float, start: int, trains_to):
    assert trains_to(policy, planted, noise, start=start) == planted


# --- what the others do, as they say -----------------------------------------------------------------------------


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("noise", [0.1, 1.0])
@pytest.mark.parametrize("planted", [3, 8])
def test_an_absolute_tolerance_of_the_size_of_the_noise_finds_it(
    shape: Any, noise: float, planted: int, weight_of, arrives_at
):
    W = weight_of(planted, noise, shape)
    tolerance = 1.01 * float((W - weight_of(planted, 0.0, shape)).norm())
    assert [arrives_at(AbsoluteTail(tolerance), W, start=start) for start in STARTS] == [planted] * 3


@pytest.mark.parametrize("name", ["relative_tail", "retained_energy"])
def test_noise_above_a_relative_tolerance_is_kept(name: str, policy_of, weight_of, arrives_at):
    assert arrives_at(policy_of(name), weight_of(3, 3.0, (48, 64)), start=5) > 20


@pytest.mark.parametrize("shape", SHAPES)
def test_equal_directions_count_by_the_scale_of_the_stable_rank(shape: Any, weight_of, arrives_at):
    policy = ScaledStableRank()
    scale = policy.scale(shape)
    found = arrives_at(policy, weight_of(3, 0.1, shape), start=5)
    assert 3 * scale * 0.95 <= found <= 3 * scale + 1


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("noise", [0.1, 0.5, 1.0])
@pytest.mark.parametrize("planted", [3, 8])
def test_a_cutoff_finds_it_from_above_and_from_below_if_it_may_grow(
    shape: Any, noise: float, planted: int, weight_of, arrives_at
):
    W = weight_of(planted, noise, shape)
    assert arrives_at(SigmaCutoff(), W, start=14) == planted
    assert [arrives_at(SigmaCutoff(growth=0.5), W, start=start) for start in STARTS] == [planted] * 3


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("noise", [0.1, 0.5, 1.0])
@pytest.mark.parametrize("planted", [3, 8])
def test_a_ratio_of_variances_finds_it_from_below_only(shape: Any, noise: float, planted: int, weight_of, arrives_at):
    W = weight_of(planted, noise, shape)
    assert [arrives_at(VarianceRatio(), W, start=start) for start in (2, 14)] == [planted, 14]


@pytest.mark.parametrize("growth", [0.0, 1.0])
def test_without_candidates_the_rank_is_never_found_from_below(growth: float, weight_of, arrives_at):
    found = arrives_at(EstimatedNoiseEdge(growth=growth), weight_of(8, 0.1, (48, 64)), start=2)
    assert found == (8 if growth else 2)


def test_every_exception_is_a_policy():
    assert MEANINGLESS.keys() <= POLICIES.keys()
