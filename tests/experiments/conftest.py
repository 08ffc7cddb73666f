"""Runs that take a fraction of a second, and a report that is not drawn."""

import functools
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from dynarank import data
from dynarank.experiments import TrainConfig, training

MakeConfig = Callable[..., TrainConfig]


@pytest.fixture(autouse=True)
def no_drawing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(training, "write_report", lambda folder: Path(folder) / "report.html")


_load = functools.cache(data.load)


@pytest.fixture(autouse=True)
def no_waiting(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(data, "load", _load)
    monkeypatch.setattr(os, "fsync", lambda descriptor: None)


@pytest.fixture
def tiny(tmp_path: Path) -> MakeConfig:
    """Return a maker of configurations: digits, two small hidden layers, 36 steps."""

    def make(**changes: Any) -> TrainConfig:
        settings: dict[str, Any] = {
            "hidden": (16, 12),
            "budget": 0.5,
            "epochs": 4,
            "batch_size": 128,
            "every": 4,
            "compare": False,
            "out": str(tmp_path / "run"),
        }
        return TrainConfig(**(settings | changes))

    return make
