"""Settings are checked when they are given, and completed in one place."""

import dataclasses
from typing import Any

import pytest

from dynarank import data, models
from dynarank._discovery import discover
from dynarank.experiments.config import TrainConfig, as_command
from dynarank.experiments.defaults import DEFAULTS, complete
from dynarank.integrators.base import AbstractIntegrator
from dynarank.ranks.base import AbstractRankPolicy


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"data": "mnst"}, "unknown data set 'mnst'. Available: digits, mnist, synthetic."),
        ({"model": "resnet"}, "unknown model 'resnet'."),
        ({"start": "middle"}, "unknown start 'middle'. Available: dense, low."),
        ({"device": "abacus"}, "device must be one of torch's, such as cpu or cuda:0, got 'abacus'."),
        ({"epochs": 0}, "epochs must be at least 1, got 0."),
        ({"start_rank": 0}, "start_rank must be at least 1, got 0."),
        ({"every": 0}, "every must be at least 1, got 0."),
        ({"threads": 0}, "threads must be at least 1, got 0."),
        ({"seed": -1}, "seed must be at least 0, got -1."),
        ({"lr": 0.0}, "lr must be above 0, got 0.0."),
        ({"base_lr": float("nan")}, "base_lr must be above 0, got nan."),
        ({"freeze": 1.5}, "freeze must be above 0 and at most 1, got 1.5."),
        ({"budget": 1.0}, "budget must be above 0 and below 1, got 1.0."),
        ({"tolerance": 0.0}, "tolerance must be above 0 and below 1, got 0.0."),
        ({"noise": -0.1, "data": "synthetic"}, "noise must be at least 0, got -0.1."),
        ({"planted_rank": 3}, "planted_rank belongs to data = synthetic, got data = digits. Leave it out."),
        ({"hidden": (8,), "model": "lenet5"}, "hidden belongs to model = mlp, got model = lenet5. Leave it out."),
        ({"hidden": ()}, "hidden must be one or more widths of at least 1, got ()."),
        ({"budget": 0.1, "tolerance": 0.1}, "budget and tolerance belong to different rank policies, got both."),
    ],
)
def test_wrong_settings_are_refused(settings: dict[str, Any], message: str):
    with pytest.raises(ValueError) as failure:
        TrainConfig(**settings)
    assert str(failure.value).startswith(message)


def test_every_data_set_has_defaults_that_can_be_used():
    assert set(DEFAULTS) == set(data.NAMES)
    for name, defaults in DEFAULTS.items():
        config = complete(TrainConfig(name))
        assert config.model in models.NAMES
        assert config.rank_policy in discover("dynarank.ranks", AbstractRankPolicy)
        assert defaults.lr.keys() <= discover("dynarank.integrators", AbstractIntegrator).keys()
        assert complete(config) == config
        TrainConfig(**dataclasses.asdict(config))


def test_what_is_given_is_kept():
    given = TrainConfig("synthetic", planted_rank=0, noise=0.0, lr=0.3, epochs=2, threads=2)
    config = complete(given)
    assert (config.planted_rank, config.noise, config.lr, config.epochs, config.threads) == (0, 0.0, 0.3, 2, 2)


@pytest.mark.parametrize(
    ("settings", "policy", "budget"),
    [
        ({"budget": 0.1}, "budget", 0.1),
        ({"tolerance": 0.1}, "relative_tail", None),
        ({"tolerance": 0.1, "rank_policy": "absolute_tail"}, "absolute_tail", None),
        ({"rank_policy": "noise_edge"}, "noise_edge", None),
        ({"rank_policy": "budget", "rank_options": ("fraction=0.3",)}, "budget", None),
        ({"data": "synthetic", "budget": 0.1}, "budget", 0.1),
        ({"data": "synthetic"}, "noise_edge", None),
    ],
)
def test_the_rank_policy_follows_from_budget_and_tolerance(settings: dict[str, Any], policy: str, budget: float | None):
    config = complete(TrainConfig(**settings))
    assert (config.rank_policy, config.budget) == (policy, budget)


def test_the_command_names_what_differs_from_the_default():
    config = TrainConfig(hidden=(8, 4), rank_options=("growth=0.5",), include_head=True, out="a b", compare=False)
    command = "dynarank train --hidden 8 4 --rank-options growth=0.5 --include-head --out 'a b' --no-compare"
    assert as_command(config) == command
