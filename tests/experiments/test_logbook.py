"""What a run notes of its weights, and when."""

import pytest
import torch
from torch import nn

from dynarank.experiments.logbook import LOOKS, Logbook, looks_after
from dynarank.stability import WeightWatch


@pytest.mark.parametrize("steps", [LOOKS, LOOKS + 1, 36, 1110, 4300])
def test_looks_are_evenly_spread_with_the_last_step_among_them(steps: int):
    found = [step for step in range(1, steps + 1) if looks_after(step, steps=steps)]
    assert len(found) == LOOKS and found[-1] == steps
    gaps = {after - before for before, after in zip([0, *found], found, strict=False)}
    assert max(gaps) - min(gaps) <= 1


def test_a_short_run_looks_after_every_step():
    assert all(looks_after(step, steps=7) for step in range(1, 8))


def test_a_look_is_noted_with_the_learning_rate_of_the_first_group():
    model = nn.Sequential(nn.Linear(4, 3), nn.Linear(3, 2))
    groups = [{"params": model[0].parameters(), "lr": 0.25}, {"params": model[1].parameters(), "lr": 0.5}]
    log, watch, optimizer = Logbook(None), WeightWatch(model), torch.optim.SGD(groups)
    for step in (0, 5):
        log.look(step, watch, optimizer)
    assert [(look["step"], look["lr"]) for look in log.history.looks] == [(0, 0.25), (5, 0.25)]
    assert log.history.looks[1]["layers"]["1"]["stability"] == pytest.approx(1)
