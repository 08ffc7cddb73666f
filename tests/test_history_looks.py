"""Looks at the weights as records: written at once, read back, resumed, and refused where they are broken."""

import json
import math
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch

from dynarank.history import History


@dataclass(frozen=True)
class Found:
    stability: float | None
    shape: tuple[int, int]


def record_looks(history: History, *, first: int, last: int) -> History:
    for step in range(first, last + 1):
        history.log(step=step, loss=1 / step)
        if step % 2 == 0:
            history.look(step=step, layers={"fc1": Found(1 / step, (3, 4)), "NaN": {"change": math.nan}}, lr=0.1)
    return history


def test_looks_are_read_back(tmp_path: Path):
    history = record_looks(History(tmp_path / "history.jsonl"), first=1, last=4)
    history.look(step=5, layers={"fc1": Found(None, (3, 4))}, lr=torch.tensor(0.5))
    history.look(step=6, layers={})
    for found in (history, History.read(tmp_path / "history.jsonl")):
        assert [(look["step"], look["lr"]) for look in found.looks] == [(2, 0.1), (4, 0.1), (5, 0.5), (6, None)]
        assert found.looks[0]["layers"]["fc1"] == {"stability": 0.5, "shape": [3, 4]}
        assert math.isnan(found.looks[0]["layers"]["NaN"]["change"])
        assert found.looks[2]["layers"]["fc1"]["stability"] is None
        assert found.looks[3]["layers"] == {}
    lines = (tmp_path / "history.jsonl").read_text().splitlines()
    assert [json.loads(line)["kind"] for line in lines].count("look") == 4


@pytest.mark.parametrize("saved", [0, 1, 4, 5])
def test_a_resumed_run_leaves_the_looks_of_an_uninterrupted_one(tmp_path: Path, saved: int):
    whole = record_looks(History(tmp_path / "whole.jsonl"), first=1, last=8)
    record_looks(History(tmp_path / "part.jsonl"), first=1, last=7)
    resumed = record_looks(History(tmp_path / "part.jsonl", resume_at=saved), first=saved + 1, last=8)
    assert (tmp_path / "part.jsonl").read_bytes() == (tmp_path / "whole.jsonl").read_bytes()
    assert resumed.looks == whole.looks


@pytest.mark.parametrize(
    ("broken", "why"),
    [
        ('{"kind": "look", "step": 1}', "look record without layers"),
        ('{"kind": "look", "layers": {}}', "look record without step"),
        ('{"kind": "look", "step": 1.5, "layers": {}}', "step must be an integer, got 1.5"),
        ('{"kind": "look", "step": 1, "layers": []}', "layers of a look must be objects by name"),
        ('{"kind": "look", "step": 1, "layers": {"fc1": 3}}', "layers of a look must be objects by name"),
        ('{"kind": "look", "step": 1, "lay', "Unterminated string"),
    ],
)
def test_a_broken_look_names_file_and_line(tmp_path: Path, broken: str, why: str):
    path = tmp_path / "history.jsonl"
    good = '{"kind": "look", "step": 1, "lr": null, "layers": {}}\n'
    path.write_text(f"{good}{broken}\n{good}")
    with pytest.raises(ValueError, match=rf"history\.jsonl, line 2: not a record \({why}"):
        History.read(path)
    path.write_text(f"{good}{broken}\n")
    assert len(History.read(path).looks) == 1


@pytest.mark.parametrize(("lr", "error"), [("high", TypeError), (torch.ones(2), ValueError)])
def test_a_learning_rate_is_a_number(lr: object, error: type[Exception]):
    history = History()
    with pytest.raises(error, match="History: lr must"):
        history.look(step=1, layers={}, lr=lr)  # type: ignore[arg-type]
    assert history.records == []
