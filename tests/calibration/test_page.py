"""The examples of docs/speed.md run."""

import re
from pathlib import Path

import torch
from torch import nn

from dynarank.layers.linear import LowRankLinear

PAGE = Path(__file__).parents[2] / "docs" / "speed.md"


def test_the_examples_run(capsys):
    model = nn.Sequential(nn.Linear(64, 64), nn.Linear(64, 512), nn.Linear(512, 512), nn.Linear(512, 10))
    scope = {"model": model, "batch": torch.zeros(64, 64)}
    for block in re.findall(r"```python\n(.*?)```", PAGE.read_text(), re.DOTALL):
        exec(compile(block, PAGE.name, "exec"), scope)
    assert [type(layer) is LowRankLinear for layer in model] == [False, False, True, False]
    reason = "dense: no rank would be faster in training with 64 rows, by a rule of thumb"
    assert reason in PAGE.read_text() and reason in capsys.readouterr().out
    assert scope["plan"].should_be_dense == ()  # type: ignore[union-attr]
