"""A case of milliseconds, in blocks of a few steps."""

from collections.abc import Sequence
from pathlib import Path

import pytest
from torch import nn

from dynarank.experiments.bench import measuring, quick
from dynarank.experiments.bench.cases.base import AbstractCase, Series, classification

CASE = """
from torch import nn

from dynarank.experiments.bench.cases.base import AbstractCase, Quoted, Series, classification


def network():
    return nn.Sequential(nn.Linear(12, 9), nn.ReLU(), nn.Linear(9, 4))


class Mine(AbstractCase):
    '''A small network.'''

    quoted = (Quoted("batch 8", "2", "theirs", 1.25, "from a paper"),)

    def series(self):
        ranks = [{"0": 3}, {"0": 2}]
        return [Series(f"batch {size}", network, (size, 12), classification, ranks, inference=(1,)) for size in (8, 6)]
"""


@pytest.fixture(autouse=True)
def few_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(measuring, "BLOCK", 1e-5)
    monkeypatch.setattr(measuring, "CYCLE", 3)
    monkeypatch.setattr(measuring, "PATIENCE", 1e9)


@pytest.fixture
def mine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """Write a case to a file in the current folder and return its name; it is the quick subset, too."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    Path("mine.py").write_text(CASE)
    monkeypatch.setattr(quick, "SUBSET", (("mine.py", "batch 8", "2"),))
    monkeypatch.setattr(quick, "SECONDS", 0.01)
    return "mine.py"


class Small(AbstractCase):
    """Two layers, one of them factorised."""

    def series(self) -> Sequence[Series]:
        return [Series("batch 8", self.network, (8, 12), classification, [{"0": 3}, {"0": 2}], inference=(1, 5))]

    def network(self) -> nn.Module:
        return nn.Sequential(nn.Linear(12, 9), nn.ReLU(), nn.Linear(9, 4))


@pytest.fixture
def small() -> Small:
    return Small()
