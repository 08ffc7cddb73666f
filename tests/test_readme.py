"""The lines of the README run as they stand."""

import re
from pathlib import Path

import torch

ROOT = Path(__file__).parents[1]


def test_the_three_lines_train_save_and_become_plain_layers(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (block,) = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)
    scope: dict = {}
    exec(compile(block, "README.md", "exec"), scope)
    model = scope["model"]
    assert "factorised" in capsys.readouterr().out
    assert not any("dynarank" in type(module).__module__ for module in model.modules())
    assert sum(p.numel() for p in model.parameters()) <= 0.2 * 84_746
    assert (tmp_path / "checkpoint" / "manifest.json").exists()
    assert torch.isfinite(model(scope["inputs"])).all()


def test_every_link_to_a_file_exists():
    links = re.findall(r"\]\((?!http)([^)#]+)\)", (ROOT / "README.md").read_text())
    assert links
    assert [link for link in links if not (ROOT / link).exists()] == []
