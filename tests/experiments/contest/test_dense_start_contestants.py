"""OIALR, Pufferfish and Cuttlefish as contestants: they end with the size that they were given."""

import gc
from typing import Any

import pytest
import torch

from dynarank.experiments.contest.methods import available, find_method
from dynarank.experiments.contest.run import train
from dynarank.experiments.contestants import Setting, Size
from dynarank.experiments.contestants._dense_start import InProportion
from dynarank.factorize import deployed_parameters
from dynarank.layers.base import low_rank_layers
from dynarank.ranks.base import LayerSpectrum, PlanContext
from dynarank.ranks.fraction import Fraction
from dynarank.ranks.scaled_stable_rank import ScaledStableRank

STEPS = 40


def trained(task: Any, word: str, **size: Any) -> tuple[Any, Any]:
    contestant, setting = find_method(word), Setting(0.01, STEPS, Size(**size))
    model = contestant.network(task, setting)
    (optimizer,) = contestant.optimizers(task, model, setting)
    gc.collect()  # nobody but the optimizer holds what makes layers low-rank
    train(task, model, [optimizer], seed=0, steps=STEPS, tell=lambda *news: None)
    return model, optimizer


@pytest.mark.parametrize("word", ["oialr", "oialr:moving=true", "pufferfish", "cuttlefish"])
@pytest.mark.parametrize("fraction", [0.4, 0.6])
def test_a_dense_start_ends_with_its_size_and_the_optimizer_holds_all(tiny: Any, word: str, fraction: float):
    model, optimizer = trained(tiny(), word, fraction=fraction)
    assert list(low_rank_layers(model)) == ["0", "2"]
    assert 0.8 * fraction < deployed_parameters(model) / deployed_parameters(tiny().model()) <= fraction
    held = {id(p) for group in optimizer.param_groups for p in group["params"]}
    assert held == {id(p) for p in model.parameters()}


@pytest.mark.parametrize("word", ["oialr", "oialr:moving=true", "pufferfish", "cuttlefish"])
def test_a_rank_may_be_given(tiny: Any, word: str):
    model, _ = trained(tiny(), word, rank=3)
    assert {name: layer.rank for name, layer in low_rank_layers(model).items()} == {"0": 3, "2": 3}


def test_pufferfish_keeps_the_same_part_of_the_rank_everywhere(tiny: Any):
    model, optimizer = trained(tiny(), "pufferfish", fraction=0.6)
    parts = {name: layer.rank / layer.max_rank for name, layer in low_rank_layers(model).items()}
    assert abs(parts["0"] - parts["2"]) < 1 / 12  # a direction of the smaller layer
    assert type(optimizer) is torch.optim.AdamW
    assert {layer.form for layer in low_rank_layers(model).values()} == {"pair"}


@pytest.mark.parametrize("word", ["pufferfish", "cuttlefish"])
def test_a_rank_policy_may_be_the_size(tiny: Any, word: str):
    model, _ = trained(tiny(), word, policy="fraction:part=0.25")
    assert {name: layer.rank for name, layer in low_rank_layers(model).items()} == {"0": 3, "2": 4}


@pytest.mark.parametrize("word", ["oialr", "pufferfish", "cuttlefish"])
def test_a_size_that_cannot_be_met_is_refused_before_training(tiny: Any, word: str):
    task, setting = tiny(), Setting(0.01, STEPS, Size(fraction=0.15))
    contestant = find_method(word)
    with pytest.raises(ValueError, match="531 dense parameters leave -4 for the factors"):
        contestant.optimizers(task, contestant.network(task, setting), setting)


@pytest.mark.parametrize("word", ["oialr", "oialr:moving=true", "pufferfish", "cuttlefish"])
def test_the_cost_of_given_ranks_is_that_of_low_rank_layers_that_stay(tiny: Any, word: str):
    task, setting = tiny(), Setting(0.01, 10**9, Size(fraction=0.5), ranks={"0": 3, "2": 2})
    contestant = find_method(word)
    model = contestant.network(task, setting)
    assert {name: layer.rank for name, layer in low_rank_layers(model).items()} == {"0": 3, "2": 2}
    assert {layer.form for layer in low_rank_layers(model).values()} == {"core" if word == "oialr" else "pair"}
    train(task, model, contestant.optimizers(task, model, setting), seed=0, steps=2, tell=lambda *news: None)
    assert {name: layer.rank for name, layer in low_rank_layers(model).items()} == {"0": 3, "2": 2}


@pytest.mark.parametrize("rule", [Fraction(0.5), ScaledStableRank(growth=0)])
@pytest.mark.parametrize("fraction", [0.2, 0.4, 0.7])
def test_ranks_fill_a_budget_in_the_proportions_of_the_rule(rule: Any, fraction: float):
    shapes = {"a": (40, 30), "b": (20, 64), "c": (16, 16)}
    spectra = [
        LayerSpectrum(name, 0.5 ** torch.linspace(0, index + 1, min(shape), dtype=torch.float64), shape)
        for index, (name, shape) in enumerate(shapes.items())
    ]
    dense, others = 3000, 3000 - sum(m * n for m, n in shapes.values())
    context = PlanContext(0, dense, others)
    ranks = [decision.rank for decision in InProportion(fraction, rule=rule).plan(spectra, context)]
    wanted = [decision.rank for decision in rule.plan(spectra, context)]
    room = fraction * dense - others
    # The largest common factor at which all layers fit, in small steps.
    fitting = []
    for step in range(1, 4000):
        tried = [max(1, min(min(s.shape), int(step / 1000 * w))) for s, w in zip(spectra, wanted, strict=True)]
        if sum(s.parameters(r) for s, r in zip(spectra, tried, strict=True)) > room:
            break
        fitting = tried
    assert sum(s.parameters(r) for s, r in zip(spectra, ranks, strict=True)) <= room
    assert all(found >= least for found, least in zip(ranks, fitting, strict=True))


def test_they_are_listed_by_name():
    assert {"oialr", "pufferfish", "cuttlefish"} <= available().keys()
