"""What the forecasting task keeps, on a few hours of noise: stretches of its parts, and the error over all of them."""

from typing import Any

import pytest
import torch

from dynarank.data import HourlySeries
from dynarank.experiments.tasks import TASKS
from dynarank.factorize import deployed_parameters, factorize_


@pytest.fixture
def task() -> Any:
    """The task with two series of 600, 140 and 130 hours of noise instead of its data."""
    task = TASKS["etth1"]()
    values = torch.randn(870, 2, generator=torch.Generator().manual_seed(0)).cumsum(0) / 10
    task.series = HourlySeries(("a", "b"), values, (600, 140, 130))
    return task


def test_a_narrower_network_fits(task: Any):
    whole = deployed_parameters(task.model())
    assert 0.5e6 < whole < 2e6
    narrower = task.narrower(whole // 10)
    assert 0.9 * (whole // 10) < deployed_parameters(narrower) <= whole // 10
    assert narrower.dropout == task.model().dropout


def test_every_parameter_is_trained_once(task: Any):
    model = task.model()
    trained = [p for o in task.optimizers(model) for group in o.param_groups for p in group["params"]]
    assert sorted(map(id, trained)) == sorted(map(id, model.parameters()))


def test_every_layer_but_the_head_can_be_factorised(task: Any):
    report = factorize_(task.model(), rank=1)
    assert {entry.name for entry in report.kept_dense} == {"positions", "head"}


def test_batches_and_calibration_are_stretches_of_the_training_part(task: Any):
    inputs, targets = next(task.training_batches(3, batch_size=10))
    again = next(task.training_batches(3, batch_size=10))
    assert torch.equal(inputs, again[0]) and torch.equal(targets, again[1])
    assert inputs.shape == (10, 2, 336) and targets.shape == (10, 2, 96)
    train = task.series.values[:600].mT
    possible = [train[:, hour : hour + 432] for hour in range(600 - 432 + 1)]
    for batch in [(inputs, targets), *task.calibration_batches()]:
        for window in torch.cat(batch, -1):
            assert any(torch.equal(window, other) for other in possible)


def test_the_recipe_learns_a_batch(task: Any):
    model = task.narrower(30_000)
    batch = next(task.training_batches(3, batch_size=4))
    (optimizer,) = task.optimizers(model)
    losses = []
    for _ in range(30):
        loss = task.loss(task.forward(model, batch), batch)
        model.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.9 * losses[0]


@pytest.mark.parametrize(("part", "first", "end"), [("validation", 600, 740), ("test", 740, 870)])
def test_quality_is_the_squared_error_over_all_stretches(task: Any, part: str, first: int, end: int):
    model = task.narrower(30_000).train()
    quality = task.evaluate(model, part)
    assert model.training and quality.accuracy is None
    model.eval()
    series, errors = task.series.values.mT, []
    for hour in range(first, end - 96 + 1):
        forecast = model(series[None, :, hour - 336 : hour])[0]
        errors += (forecast - series[:, hour : hour + 96]).square().flatten().tolist()
    assert quality.loss == pytest.approx(sum(errors) / len(errors), rel=1e-5)
