"""The example of docs/memory.md runs and says what the page says."""

import re
from pathlib import Path

PAGE = Path(__file__).parents[2] / "docs" / "memory.md"


def test_the_example_runs_and_low_rank_saves_what_the_page_says(capsys):
    (block,) = re.findall(r"```python\n(.*?)```", PAGE.read_text(), re.DOTALL)
    scope: dict = {}
    exec(compile(block, str(PAGE), "exec"), scope)
    dense, low_rank = scope["dense"], scope["low_rank"]
    assert low_rank.weights < 0.6 * dense.weights and low_rank.optimizer_state < 0.6 * dense.optimizer_state
    assert low_rank.activations > dense.activations
    assert str(dense) in capsys.readouterr().out
