"""The lines of the README run as they stand."""

import re
from pathlib import Path

import pytest
import torch

import dynarank

ROOT = Path(__file__).parents[1]


@pytest.fixture
def run_block(tmp_path, monkeypatch):
    """Run the block of Python that holds a word, in an empty folder."""
    monkeypatch.chdir(tmp_path)
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)

    def run(word: str) -> dict:
        (block,) = [block for block in blocks if word in block]
        scope: dict = {}
        exec(compile(block, "README.md", "exec"), scope)
        return scope

    return run


def is_plain(model: torch.nn.Module) -> bool:
    return not any("dynarank" in type(module).__module__ for module in model.modules())


def test_the_three_lines_train_save_and_become_plain_layers(run_block, tmp_path, capsys):
    scope = run_block("dynarank.Budget(")
    model = scope["model"]
    assert "factorised" in capsys.readouterr().out
    assert is_plain(model)
    dense = (64 + 1) * 256 + (256 + 1) * 256 + (256 + 1) * 10
    assert sum(p.numel() for p in model.parameters()) <= 0.2 * dense
    assert (tmp_path / "checkpoint" / "manifest.json").exists()
    assert torch.isfinite(model(scope["inputs"])).all()


def test_the_lines_on_compression_analyse_compress_recover_and_save(run_block, tmp_path, capsys):
    scope = run_block("compress_(")
    assert "of 3 layers compressed" in capsys.readouterr().out
    model, original = scope["model"], scope["original"]
    assert is_plain(model)
    assert sum(p.numel() for p in model.parameters()) <= 0.5 * sum(p.numel() for p in original.parameters())
    inputs = scope["batches"][0][0]
    loaded = dynarank.load_compressed(tmp_path / "small", original)
    torch.testing.assert_close(loaded(inputs), model(inputs), rtol=1e-4, atol=1e-5)


def test_the_one_line_makes_a_network_low_rank_on_the_way(run_block):
    scope = run_block("oialr(")
    assert set(scope["start"].low_rank) == {"0", "2"}
    assert all(layer.form == "core" for layer in scope["start"].low_rank.values())


def test_every_link_to_a_file_exists():
    links = re.findall(r"\]\((?!http)([^)#]+)\)", (ROOT / "README.md").read_text())
    assert links
    assert [link for link in links if not (ROOT / link).exists()] == []


def test_the_plan_and_the_memory_of_a_step_are_printed(run_block, capsys):
    scope = run_block("speed_plan(")
    shown = capsys.readouterr().out
    assert "activations" in shown and "512 x 512" in shown
    assert torch.isfinite(scope["model"](scope["batch"][0])).all()
