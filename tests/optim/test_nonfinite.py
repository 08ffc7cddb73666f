"""A NaN or an infinity in a gradient stops or skips the whole step; nothing has changed."""

import logging
from functools import partial
from typing import Any

import pytest
import torch
from torch import nn

from dynarank._discovery import discover
from dynarank.errors import NonFiniteGradientError
from dynarank.integrators.base import AbstractIntegrator
from dynarank.schedules.periodic import Periodic

INTEGRATORS = sorted(discover("dynarank.integrators", AbstractIntegrator))
PLACES = {
    "0.A": lambda m: m[0].A,
    "2.B": lambda m: m[2].B,
    "3.weight": lambda m: m[3].weight,
    "4.bias": lambda m: m[4].bias,
}


def ready(kit: Any, **options: Any) -> tuple[Any, Any]:
    """Three steps with AdamW for the rest, and gradients for a fourth."""
    model = kit.make_model()
    options = {"base": torch.optim.AdamW, "base_options": {"lr": 0.01}, "schedule": Periodic(every=4)} | options
    optimizer = kit.make_optimizer(model, weight_decay=0.1, **options)
    kit.train(model, optimizer, range(3))
    kit.backward(model, 3)
    return model, optimizer


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
@pytest.mark.parametrize("place", PLACES)
def test_raise_names_the_parameter_and_the_step_and_changes_nothing(kit, place, value):
    model, optimizer = ready(kit)
    PLACES[place](model).grad.view(-1)[3] = value
    before = kit.snapshot(model, optimizer)
    with pytest.raises(NonFiniteGradientError, match=rf"{place}: gradient is not finite at step 4. .* after step 3"):
        optimizer.step()
    kit.assert_same(kit.snapshot(model, optimizer), before)


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("integrator", ["tangent_muon", "parallel_bug", "plain_factors"])
def test_skip_says_so_and_changes_nothing(kit, caplog, place, integrator):
    model, optimizer = ready(kit, nonfinite="skip", integrator=integrator)
    PLACES[place](model).grad.view(-1)[0] = torch.nan
    before, events = kit.snapshot(model, optimizer), []
    optimizer.on_rank_event(events.extend)
    with caplog.at_level(logging.WARNING):
        assert optimizer.step() is None
    kit.assert_same(kit.snapshot(model, optimizer), before)
    assert f"{place}: gradient is not finite at step 4; the step was skipped" in caplog.text and events == []
    kit.train(model, optimizer, range(1))
    assert optimizer.steps == 4 and len(events) == 2


def test_augmented_bug_names_the_core(kit):
    model, optimizer = ready(kit, integrator="augmented_bug", schedule=kit.NEVER)
    model[0].S.grad[0, 0] = torch.nan
    with pytest.raises(NonFiniteGradientError, match=r"0\.S: gradient"):
        optimizer.step()


def poisoned_backward(kit: Any, model: Any, step: int) -> None:
    x, y = kit.batch(step)
    x[2, 5] = torch.nan
    model.zero_grad()
    nn.functional.cross_entropy(model(x), y).backward()


@pytest.mark.parametrize("integrator", INTEGRATORS)
def test_a_nan_in_the_data_is_survived_end_to_end(kit, integrator):
    losses, parameters = [], []
    for poisoned in (True, False):
        model = kit.make_model()
        optimizer = kit.make_optimizer(
            model, nonfinite="skip", integrator=integrator, rank_policy="relative_tail", schedule=Periodic(every=3)
        )
        for step in range(8):
            if step == 4 and poisoned:
                kit.take_step(optimizer, partial(poisoned_backward, kit, model, step))
            losses.append(kit.train(model, optimizer, range(step, step + 1))[0])
        parameters.append(model.state_dict())
    assert losses[:8] == losses[8:]
    kit.assert_same(*parameters)


def test_a_norm_that_overflows_is_no_reason_to_stop(kit):
    model = kit.make_model(dtype=torch.float32)
    optimizer = kit.make_optimizer(model, lr=1e-30, base_options={"lr": 1e-30})
    kit.backward(model)
    for p in model.parameters():
        p.grad.fill_(1e30)
    optimizer.step()
    assert optimizer.steps == 1 and all(torch.isfinite(p).all() for p in model.parameters())


def test_a_parameter_from_outside_the_model_is_told_apart(kit):
    model = kit.make_model()
    optimizer = kit.make_optimizer(model)
    temperature = nn.Parameter(torch.ones(1, dtype=torch.float64))
    optimizer.add_param_group({"params": temperature})
    temperature.grad = torch.full_like(temperature, torch.nan)
    with pytest.raises(NonFiniteGradientError, match="a parameter outside the model"):
        optimizer.step()


def test_a_nan_in_a_frozen_layer_is_seen_only_where_it_has_a_gradient(kit):
    model = kit.make_model()
    optimizer = kit.make_optimizer(model)
    model[0].requires_grad_(False)
    with torch.no_grad():
        model[0].A[0, 0] = torch.nan
    model[0](kit.batch(0)[0])
    model[4](torch.ones(1, 9, dtype=torch.float64)).sum().backward()
    optimizer.step()
    assert optimizer.steps == 1
