"""A rank moves only when it is wanted beyond the margin, and then all the way."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import pytest
import torch

from dynarank.ranks.base import AbstractRankPolicy, Decision, LayerSpectrum, PlanContext
from dynarank.ranks.hysteresis import Hysteresis

CONTEXT = PlanContext(0, 0, 0)


@dataclass(frozen=True)
class Wants(AbstractRankPolicy):
    rank: int
    tried: int = 4

    def plan(self, spectra: Sequence[LayerSpectrum], context: PlanContext) -> list[Decision]:
        return [Decision(self.rank, self.tried, "wanted") for _ in spectra]


def rank_of(policy: Hysteresis, *, seen: int = 40, kept: int | None = 20) -> int:
    layer = LayerSpectrum("layer", torch.ones(seen, dtype=torch.float64), (64, 48), kept=kept)
    return policy.plan([layer], CONTEXT)[0].rank


@pytest.mark.parametrize(("grow", "prune"), [(3, 2), (0.15, 0.1), (3, 0.1), (0, 0), (0.0, 5), (5, 0.0)])
def test_only_what_lies_beyond_the_margins_is_carried_out(grow: float, prune: float):
    up, down = (margin if isinstance(margin, int) else margin * 20 for margin in (grow, prune))
    for wanted in range(1, 41):
        near = 20 - down <= wanted <= 20 + up
        assert rank_of(Hysteresis(Wants(wanted), grow=grow, prune=prune)) == (20 if near else wanted)


def test_a_flickering_wish_stays_still():
    ranks, present = [], 20
    for wanted in [21, 19, 20, 22, 18, 21, 30, 29, 31, 28]:
        present = rank_of(Hysteresis(Wants(wanted), grow=0.1, prune=0.1), kept=present)
        ranks.append(present)
    assert ranks == [20] * 6 + [30] * 4


def test_the_present_rank_is_what_there_is_where_nothing_else_is_known():
    assert rank_of(Hysteresis(Wants(10), prune=2), seen=12, kept=None) == 12
    assert rank_of(Hysteresis(Wants(9), prune=2), seen=12, kept=None) == 9
    assert rank_of(Hysteresis(Wants(6), prune=9), seen=6, kept=9) == 6, "a layer that others cut"


def test_candidates_are_those_of_the_policy_as_far_as_they_fit():
    layer = LayerSpectrum("layer", torch.ones(44, dtype=torch.float64), (64, 48), kept=44)
    assert Hysteresis(Wants(43, tried=5), prune=2).plan([layer], CONTEXT) == [Decision(44, 4, "stays: 43 is near")]
    assert Hysteresis(Wants(30, tried=5), prune=2).plan([layer], CONTEXT) == [Decision(30, 5, "wanted")]


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"policy": "budget"}, TypeError, "Hysteresis: policy must be an instance of a rank policy, got 'budget'"),
        ({"grow": -1}, ValueError, "Hysteresis: grow must be at least 0 and finite, got -1"),
        ({"prune": float("nan")}, ValueError, "Hysteresis: prune must be at least 0 and finite, got nan"),
    ],
)
def test_what_is_out_of_range_is_named(options: dict[str, Any], error: type[Exception], message: str):
    with pytest.raises(error, match=message):
        Hysteresis(**options)
