"""A task of milliseconds with its comparisons, and what their rows say."""

import json
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from torch import nn

from dynarank.experiments.contest.config import ContestConfig
from dynarank.experiments.tasks import TASKS, AbstractTask, Quality
from dynarank.factorize import deployed_parameters

WIDTH = 16


class Tiny(AbstractTask):
    """Which of three inputs is the largest."""

    training_steps = 24
    evaluated: ClassVar[Counter[str]] = Counter()

    def net(self, width: int) -> nn.Module:
        return nn.Sequential(nn.Linear(12, width), nn.ReLU(), nn.Linear(width, width), nn.ReLU(), nn.Linear(width, 3))

    def model(self) -> nn.Module:
        return self.net(WIDTH)

    def narrower(self, parameters: int) -> nn.Module:
        fitting = [width for width in range(1, WIDTH + 1) if deployed_parameters(self.net(width)) <= parameters]
        if not fitting:
            raise ValueError(f"parameters must be at least 21, got {parameters}.")
        return self.net(max(fitting))

    def training_batches(self, seed: int, *, batch_size: int = 32) -> Iterator[Any]:
        generator = torch.Generator().manual_seed(seed)
        while True:
            inputs = torch.randn(batch_size, 12, generator=generator)
            yield inputs, inputs[:, :3].argmax(1)

    def calibration_batches(self) -> list[Any]:
        return [next(self.training_batches(1))]

    def optimizers(self, model: nn.Module) -> list[torch.optim.Optimizer]:
        return [torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)]

    def loss(self, outputs: Any, batch: Any) -> torch.Tensor:
        return nn.functional.cross_entropy(outputs, batch[1])

    @torch.no_grad()
    def evaluate(self, model: nn.Module, part: str = "test") -> Quality:
        self.evaluated[part] += 1
        inputs, targets = next(self.training_batches({"validation": 1002, "test": 1003}[part], batch_size=200))
        outputs = model(inputs)
        correct = (outputs.argmax(1) == targets).float().mean()
        return Quality(float(self.loss(outputs, (inputs, targets))), float(correct))


@pytest.fixture(autouse=True)
def tiny(monkeypatch: pytest.MonkeyPatch) -> type[Tiny]:
    """Put the tiny task among the built-in ones and return it."""
    monkeypatch.setitem(TASKS, "tiny", Tiny)
    monkeypatch.setattr(Tiny, "evaluated", Counter())
    return Tiny


@pytest.fixture
def config() -> Callable[..., ContestConfig]:
    """Return a maker of configurations: half the size, two seeds, two learning rates."""

    def make(*methods: str, **changes: Any) -> ContestConfig:
        settings: dict[str, Any] = {"size": (0.5,), "seeds": (0, 1), "factors": (0.5, 1.0), "seconds": 0.0}
        return ContestConfig("tiny", methods=methods, **(settings | changes))

    return make


@pytest.fixture
def rows_of() -> Callable[[Path], list[dict[str, Any]]]:
    """Return a reader of the rows of runs in a folder, without what depends on the machine."""

    def read(folder: Path) -> list[dict[str, Any]]:
        rows = [json.loads(line) for line in (folder / "rows.jsonl").read_text().splitlines()]
        hidden = ("seconds", "machine")
        return [{key: row[key] for key in row if key not in hidden} for row in rows if "method" in row]

    return read
