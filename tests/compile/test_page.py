"""The example of the page runs, and its ranks change without a new graph."""

import re
from pathlib import Path
from typing import Any

import pytest
import torch

PAGE = Path(__file__).parents[2] / "docs" / "compile.md"


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # of the default backend, about itself
def test_the_example_runs():
    block = re.findall(r"```python\n(.*?)```", PAGE.read_text(), flags=re.DOTALL)[0]
    seen, scope = torch._dynamo.utils.counters["stats"], dict[str, Any]()
    before = seen["unique_graphs"]
    exec(compile(block, PAGE.name, "exec"), scope)
    assert scope["optimizer"].steps == 30 and seen["unique_graphs"] == before + 1
    assert scope["model"][0].rank != 8 or scope["model"][2].rank != 8
    torch.compiler.reset()
