"""The smallest size within a tolerance: what is tolerated, what is tried, and what is left alone."""

import copy
import math
from typing import Any

import pytest
import torch
from torch import nn

from dynarank.compress import Compressor, compress_to_tolerance_, renew_statistics_
from dynarank.compress.tolerance import Score, Trial
from dynarank.factorize import deployed_parameters
from dynarank.layers.base import low_rank_layers


@pytest.fixture
def model() -> nn.Sequential:
    layers = (nn.Linear(30, 24), nn.BatchNorm1d(24), nn.ReLU(), nn.Linear(24, 24), nn.ReLU(), nn.Linear(24, 5))
    return nn.Sequential(*layers).eval()


@pytest.fixture
def inputs() -> torch.Tensor:
    return torch.randn(200, 30)


def size_score(model: nn.Module) -> float:
    """A score that falls with the size of the model: bisection has a known answer."""
    return deployed_parameters(model) / 1000


@pytest.mark.parametrize("tolerance", [0.2, 0.5, 0.9])
def test_the_search_ends_at_the_smallest_size_within_the_tolerance(model: nn.Sequential, tolerance: float):
    before = size_score(model)
    least = before - tolerance
    found = compress_to_tolerance_(model, size_score, tolerance, precision=0.001)
    assert size_score(model) >= least
    # The last direction of a layer takes 48 to 54 numbers; the search cannot come closer than that.
    assert size_score(model) <= least + 0.08
    assert found.report.parameters_after == deployed_parameters(model)


def test_a_score_that_should_be_low_may_grow_by_a_part(model: nn.Sequential):
    before = 1 / size_score(model)
    compress_to_tolerance_(model, lambda m: 1 / size_score(m), 0.5, higher_is_better=False, precision=0.001)
    assert before < 1 / size_score(model) <= 1.5 * before


def test_the_model_has_the_score_that_was_measured_on_a_copy(model: nn.Sequential, inputs: torch.Tensor):
    batches = [inputs[:100], inputs[100:]]
    renew_statistics_(model, batches)  # as in a network that was trained
    wanted = model(inputs).detach()

    def likeness(candidate: nn.Module) -> float:
        return -float((candidate(inputs) - wanted).norm() / wanted.norm())

    found = compress_to_tolerance_(model, likeness, 0.3, calibration=batches)
    chosen = min((trial for trial in found.trials if trial.tolerated), key=lambda trial: trial.fraction)
    assert chosen.fraction < 1
    with torch.no_grad():
        assert likeness(model) == pytest.approx(chosen.score, rel=1e-6)
    assert (found.trials[0].fraction, found.trials[0].score) == (1, 0)
    assert all(trial.tolerated == (trial.score >= -0.3) for trial in found.trials)


def test_evaluation_is_without_gradients_and_in_evaluation_mode(model: nn.Sequential):
    seen = []
    model.train()
    compress_to_tolerance_(
        model, lambda m: seen.append((torch.is_grad_enabled(), m.training)) or size_score(m), 0.5, precision=0.1
    )
    assert set(seen) == {(False, False)}
    assert model.training


def test_every_size_is_told(model: nn.Sequential):
    told: list[Trial] = []
    found = compress_to_tolerance_(model, size_score, 0.5, tell=told.append)
    assert tuple(told) == found.trials
    assert f"{told[-1].fraction:.1%} {told[-1].score:.4g}" in str(found)


def test_a_tolerance_that_rounding_just_misses_is_kept(model: nn.Sequential):
    scores = iter([0.97333336, 0.96333331, *(20 * [0.0])])  # 0.01 apart but for float32
    found = compress_to_tolerance_(model, lambda m: next(scores), 0.01)
    assert found.trials[1].tolerated


@pytest.mark.parametrize(
    ("score", "options", "message"),
    [
        (lambda m: 0.0 if low_rank_layers(m) else 1.0, {}, "the score goes from 1 to 0 at "),
        (lambda m: math.nan, {}, "the score of the model must be finite, got nan"),
        (size_score, {"tolerance": -0.1}, "tolerance must be at least 0, got -0.1"),
        (size_score, {"precision": 0.0}, "precision must be between 0 and 1, got 0.0"),
        (size_score, {"measure": "size"}, "unknown measure 'size'"),
        (size_score, {"measure": "flops"}, "a budget of flops needs calibration data"),
    ],
)
def test_a_failure_leaves_the_model(model: nn.Sequential, score: Score, options: dict[str, Any], message: str):
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(ValueError, match=message):
        compress_to_tolerance_(model, score, **{"tolerance": 0.1, **options})
    assert model.state_dict().keys() == before.keys()
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_layers_are_looked_at_once(model: nn.Sequential, monkeypatch: pytest.MonkeyPatch):
    made = []
    build = Compressor.__init__
    monkeypatch.setattr(Compressor, "__init__", lambda self, *a, **k: made.append(self) or build(self, *a, **k))
    compress_to_tolerance_(model, size_score, 0.5)
    assert len(made) == 1
