"""What an analysis shows and saves."""

import json
import math
from dataclasses import replace

import pytest
import torch
from torch import nn

from dynarank.analysis import analyze


def network() -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(3, 9, 3), nn.ReLU(), nn.Flatten(), nn.Linear(9 * 16, 21), nn.ReLU(), nn.Linear(21, 13)
    )


def batches() -> list[torch.Tensor]:
    return [torch.randn(16, 3, 6, 6) for _ in range(2)]


def test_an_unknown_name_is_refused():
    with pytest.raises(KeyError, match="no weight is called 'fc'"):
        analyze(network())["fc"]


def test_the_tables_show_every_layer_and_budget():
    found = analyze(network(), calibration=batches(), timed=0.001, budgets=(0.5, 0.001))
    lines = str(found).splitlines()
    assert lines[0].split()[:3] == ["layer", "kind", "shape"]
    assert lines[0].endswith("at 50 %")
    assert [line.split()[0] for line in lines[1:4]] == ["0", "3", "5"]
    assert "9 x 27" in lines[1]
    assert lines[-2].lstrip().startswith("50 %")
    assert "cannot be met" in lines[-1]


def test_json_holds_everything(tmp_path):
    found = analyze(network(), calibration=batches(), budgets=(0.5, 0.001))
    path = found.save_json(tmp_path / "new" / "found.json")
    loaded = json.loads(path.read_text())
    assert loaded == json.loads(json.dumps(found.as_dict()))
    assert [layer["name"] for layer in loaded["layers"]] == ["0", "3", "5"]
    assert loaded["layers"][1]["spectrum"]["rank_90"] == found["3"].spectrum.rank_90
    assert loaded["outlooks"][0]["damage"] == pytest.approx(found.outlooks[0].damage)
    assert loaded["outlooks"][0]["plan"]["layers"][0]["name"] == "0"
    assert loaded["outlooks"][1]["plan"] is None


def test_numbers_that_json_cannot_hold_are_null():
    found = analyze(network())
    found = replace(found, layers=(replace(found["0"], sensitivity=math.inf),))
    assert found.as_dict()["layers"][0]["sensitivity"] is None


def test_progress_names_each_layer():
    told = []
    analyze(network(), tell=lambda done, total, name: told.append((done, total, name)))
    assert told == [(0, 3, "0"), (1, 3, "3"), (2, 3, "5")]
