"""The policy in force is the policy itself with one option on its way from begin to end."""

from typing import Any

import pytest
import torch

from dynarank.ranks.base import LayerSpectrum, PlanContext
from dynarank.ranks.budget import Budget
from dynarank.ranks.capped import Capped
from dynarank.ranks.noise_edge import NoiseEdge
from dynarank.ranks.relative_tail import RelativeTail
from dynarank.ranks.scheduled import Scheduled

LAYERS = [LayerSpectrum("layer", 0.8 ** torch.arange(30, dtype=torch.float64), (48, 64))]


@pytest.mark.parametrize("power", [1.0, 3.0])
@pytest.mark.parametrize(("begin", "end"), [(0.5, 0.1), (0.1, 0.5)])
def test_plans_are_those_of_the_policy_with_the_value_of_the_step(power: float, begin: float, end: float):
    policy = Scheduled(RelativeTail(growth=0.5, min_rank=2), begin=begin, end=end, over=40, power=power)
    for step in (0, 1, 20, 39, 40, 41, 10_000):
        value = end + (begin - end) * max(0.0, 1 - step / 40) ** power
        context = PlanContext(step, 3072, 0)
        expected = RelativeTail(value, growth=0.5, min_rank=2).plan(LAYERS, context)
        assert policy.plan(LAYERS, context) == expected


def test_the_cubic_of_a_budget_is_the_budgets_own():
    own = Budget(0.1, start=0.6, steps=100)
    scheduled = Scheduled(Budget(0.1), option="fraction", begin=0.6, end=0.1, over=100, power=3.0)
    for step in (0, 25, 99, 150):
        context = PlanContext(step, 3072, 0)
        assert scheduled.plan(LAYERS, context) == own.plan(LAYERS, context)


def test_whole_numbers_stay_whole():
    policy = Scheduled(RelativeTail(), option="min_rank", begin=8, end=1, over=4)
    assert [policy.at(step).min_rank for step in range(6)] == [8, 6, 4, 3, 1, 1]


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"policy": "budget"}, TypeError, "Scheduled: policy must be an instance of a rank policy, got 'budget'"),
        ({"option": "tolerence"}, ValueError, "a number of RelativeTail, one of tolerance, growth, min_rank; got"),
        ({"policy": Capped(), "option": "policy"}, ValueError, "a number of Capped, one of largest; got 'policy'"),
        ({"policy": NoiseEdge(), "option": "factor", "end": 0.0}, ValueError, "NoiseEdge: factor must be above 0"),
        ({"begin": 1.5}, ValueError, "RelativeTail: tolerance must be between 0 and 1, got 1.5"),
        ({"over": 0}, ValueError, "Scheduled: over must be at least 1 and power above 0, got 0 and 1.0"),
        ({"power": 0.0}, ValueError, "Scheduled: over must be at least 1 and power above 0, got 1000 and 0.0"),
    ],
)
def test_what_is_out_of_range_is_named(options: dict[str, Any], error: type[Exception], message: str):
    with pytest.raises(error, match=message):
        Scheduled(**options)
