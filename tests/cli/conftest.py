"""A tiny task in a file of its own, and one among the built-in tasks."""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from dynarank.experiments.tasks import TASKS, AbstractTask, Quality

TASK = """
import torch
from torch import nn

measure, higher_is_better = "accuracy", True
generator = torch.Generator().manual_seed(0)
inputs = torch.randn(256, 24, generator=generator)
targets = (inputs @ torch.randn(24, 4, generator=generator)).argmax(1)


def network(width=40):
    return nn.Sequential(nn.Linear(24, width), nn.ReLU(), nn.Linear(width, width), nn.ReLU(), nn.Linear(width, 4))


def model():
    torch.manual_seed(0)
    net = network()
    optimizer = torch.optim.Adam(net.parameters(), lr=1e-2)
    for _ in range(40):
        optimizer.zero_grad()
        loss(net(inputs), (inputs, targets)).backward()
        optimizer.step()
    return net


def training_batches(seed):
    data = torch.utils.data.TensorDataset(inputs, targets)
    shuffling = torch.Generator().manual_seed(seed)
    return torch.utils.data.DataLoader(data, batch_size=64, shuffle=True, generator=shuffling)


def loss(outputs, batch):
    return nn.functional.cross_entropy(outputs, batch[1])


def evaluate(model):
    return {"accuracy": (model(inputs).argmax(1) == targets).float().mean(), "loss": loss(model(inputs), (0, targets))}


def narrower(parameters):
    return network(max(w for w in range(1, 40) if sum(p.numel() for p in network(w).parameters()) <= parameters))
"""


@pytest.fixture
def write_task(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., str]:
    """Return a writer of the tiny task, with texts replaced; its folder is the current one."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)  # and taken off again afterwards

    def write(*changes: tuple[str, str], name: str = "mine.py") -> str:
        text = TASK
        for before, after in changes:
            assert before in text
            text = text.replace(before, after)
        Path(name).write_text(text)
        return name

    return write


class TinyTask(AbstractTask):
    """A classifier of noise."""

    training_steps = 60

    def model(self) -> nn.Module:
        return nn.Sequential(nn.Linear(24, 32), nn.ReLU(), nn.Linear(32, 32), nn.ReLU(), nn.Linear(32, 3))

    def narrower(self, parameters: int) -> nn.Module:
        return nn.Sequential(nn.Linear(24, 8), nn.ReLU(), nn.Linear(8, 3))

    def training_batches(self, seed: int) -> Iterator[Any]:
        generator = torch.Generator().manual_seed(seed)
        while True:
            inputs = torch.randn(32, 24, generator=generator)
            yield inputs, inputs[:, :3].argmax(1)

    def calibration_batches(self) -> list[Any]:
        return [next(self.training_batches(1))]

    def optimizers(self, model: nn.Module) -> list[torch.optim.Optimizer]:
        return [torch.optim.Adam(model.parameters(), lr=1e-2)]

    def loss(self, outputs: Any, batch: Any) -> torch.Tensor:
        return nn.functional.cross_entropy(outputs, batch[1])

    @torch.no_grad()
    def evaluate(self, model: nn.Module, part: str = "test") -> Quality:
        inputs, targets = next(self.training_batches({"validation": 2, "test": 3}[part]))
        outputs = model(inputs)
        correct = (outputs.argmax(1) == targets).float().mean()
        return Quality(float(self.loss(outputs, (inputs, targets))), float(correct))


@pytest.fixture
def tiny(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """Put the tiny task among the built-in ones and return its name."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(TASKS, "tiny", TinyTask)
    return "tiny"
