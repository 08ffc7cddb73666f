"""What every task that classifies images keeps: its recipe trains each parameter once, narrower networks fit."""

from typing import Any

import pytest
import torch

from dynarank.data import DataSplits
from dynarank.experiments.tasks import TASKS
from dynarank.factorize import deployed_parameters, factorize_

SHAPES = {
    "lenet5": (1, 28, 28),
    "mlp500": (1, 28, 28),
    "mlp784": (1, 28, 28),
    "resnet20": (3, 32, 32),
    "vgg16": (3, 32, 32),
    "vit": (3, 32, 32),
    "vit_small": (3, 32, 32),
}
SIZES = {"lenet5": 431_080, "mlp500": 1_149_010, "mlp784": 2_469_610, "resnet20": 271_117, "vgg16": 14_732_503}


@pytest.fixture(params=sorted(SHAPES))
def task(request: pytest.FixtureRequest) -> Any:
    """A task with a few images of noise instead of its data."""
    task = TASKS[request.param]()
    torch.manual_seed(0)
    sizes = {"train": 40, "validation": 12, "test": 9}
    parts: dict[str, Any] = {}
    for part, size in sizes.items():
        parts |= {f"{part}_inputs": torch.randn(size, *SHAPES[request.param])}
        parts |= {f"{part}_targets": torch.arange(size) % 10}
    task.splits = DataSplits("noise", **parts, classes=10)
    return task


def test_these_are_all_tasks_on_images():
    assert set(TASKS) == {*SHAPES, "etth1", "gpt", "gpt_small"}


def test_the_networks_have_the_size_of_the_literature():
    sizes = {name: deployed_parameters(TASKS[name]().model()) for name in SIZES}
    assert sizes == SIZES


def test_a_narrower_network_fits(task: Any):
    whole = deployed_parameters(task.model())
    narrower = task.narrower(whole // 10)
    assert 0.9 * (whole // 10) < deployed_parameters(narrower) <= whole // 10
    assert not any(p.is_meta for p in narrower.parameters())


def test_every_parameter_is_trained_once(task: Any):
    model = task.model()
    trained = [p for o in task.optimizers(model) for group in o.param_groups for p in group["params"]]
    assert sorted(map(id, trained)) == sorted(map(id, model.parameters()))


def test_the_recipe_learns_a_batch(task: Any):
    model = task.narrower(30_000)
    batch = next(task.training_batches(3, batch_size=10))
    again = next(task.training_batches(3, batch_size=10))
    assert torch.equal(batch[0], again[0]) and len(batch[0]) == 10
    optimizers = task.optimizers(model)
    losses = []
    for _ in range(10):
        loss = task.loss(task.forward(model, batch), batch)
        model.zero_grad()
        loss.backward()
        for optimizer in optimizers:
            optimizer.step()
        losses.append(loss.item())
    assert 2 < losses[0] < 4 and losses[-1] < losses[0] - 0.05


def test_quality_is_that_of_the_part(task: Any):
    model = task.narrower(30_000).train()
    for part, size in (("validation", 12), ("test", 9)):
        quality = task.evaluate(model, part)
        images, labels = task.splits.part(part)
        logits = model.eval()(images)
        model.train()
        expected = torch.nn.functional.cross_entropy(logits, labels).item()
        assert quality.loss == pytest.approx(expected, rel=1e-4)
        assert quality.accuracy == (logits.argmax(1) == labels).sum() / size


def test_calibration_is_training_data_without_augmentation(task: Any):
    images = torch.cat([batch[0] for batch in task.calibration_batches()])
    assert torch.equal(images, task.splits.train_inputs[: len(images)]) and len(images) == 40


def test_every_layer_but_the_head_can_be_factorised(task: Any):
    report = factorize_(task.narrower(100_000), rank=1)
    assert {entry.name for entry in report.kept_dense} - {"positions"} == {"head"}
