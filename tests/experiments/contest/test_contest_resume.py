"""An interrupted comparison goes on, a finished one is left alone, and other settings are refused."""

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from dynarank.experiments.contest.config import ContestConfig
from dynarank.experiments.contest.contest import News, compare_methods

Make = Callable[..., ContestConfig]
Read = Callable[[Path], list[dict[str, Any]]]


def interrupt_after(runs: int) -> Callable[[News], None]:
    def tell(news: News) -> None:
        if news.outcome is not None and news.done == runs:
            raise KeyboardInterrupt

    return tell


def test_an_interrupted_comparison_goes_on_with_what_is_missing(config: Make, rows_of: Read, tmp_path: Path):
    chosen = config("dense", "narrower", "tangent_muon")
    whole, _ = compare_methods(chosen, tmp_path / "whole")
    for runs in (3, 7):
        with pytest.raises(KeyboardInterrupt):
            compare_methods(chosen, tmp_path / "parts", tell=interrupt_after(runs))
        assert len(rows_of(tmp_path / "parts")) == runs
        assert json.loads((tmp_path / "parts" / "results.json").read_text())["missing"] == 12 - runs
        with (tmp_path / "parts" / "rows.jsonl").open("a") as file:
            file.write('{"key": "cut sh')  # what a power failure leaves
    there = (tmp_path / "parts" / "rows.jsonl").read_text().splitlines()[:-1]
    told: list[News] = []
    parts, _ = compare_methods(chosen, tmp_path / "parts", tell=told.append)
    assert (tmp_path / "parts" / "rows.jsonl").read_text().splitlines()[:7] == there
    assert len([news for news in told if news.outcome is not None]) == 5
    assert rows_of(tmp_path / "parts") == rows_of(tmp_path / "whole")
    assert [row.scores for row in parts.rows] == [row.scores for row in whole.rows]


def test_a_finished_comparison_trains_and_measures_nothing(config: Make, tmp_path: Path):
    chosen = config("dense", "tangent_muon")
    first, _ = compare_methods(chosen, tmp_path)
    text = (tmp_path / "rows.jsonl").read_text()
    told: list[News] = []
    second, _ = compare_methods(chosen, tmp_path, tell=told.append)
    assert told == []
    assert (tmp_path / "rows.jsonl").read_text() == text
    assert second == first


def test_methods_sizes_and_seeds_may_be_added(config: Make, rows_of: Read, tmp_path: Path):
    compare_methods(config("dense"), tmp_path)
    before = rows_of(tmp_path)
    found, _ = compare_methods(config("dense,tangent_muon", size=(0.5, 0.6), seeds=(0, 1, 2)), tmp_path)
    assert rows_of(tmp_path)[: len(before)] == before
    assert [len(row.scores) for row in found.rows] == [3, 3, 3]
    assert sum(row["method"] == "dense" for row in rows_of(tmp_path)) == 5


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"steps": 9}, "other settings: steps 24 instead of 9"),
        ({"tune_seed": 7}, "other settings: tune_seed 100 instead of 7"),
        ({"tune_steps": 5}, "other settings: tune_steps None instead of 5"),
    ],
)
def test_a_folder_of_other_settings_is_refused(config: Make, tmp_path: Path, changes: dict[str, Any], message: str):
    compare_methods(config("dense", factors=(1.0,), seeds=(0,)), tmp_path)
    before = (tmp_path / "rows.jsonl").read_text()
    with pytest.raises(ValueError, match=re.escape(message)):
        compare_methods(config("dense", factors=(1.0,), seeds=(0,), **changes), tmp_path)
    assert (tmp_path / "rows.jsonl").read_text() == before


def test_a_folder_of_something_else_is_refused(config: Make, tmp_path: Path):
    (tmp_path / "theirs").touch()
    with pytest.raises(ValueError, match="out must be a new or an empty folder or one of a comparison"):
        compare_methods(config("dense"), tmp_path)


def test_a_broken_row_is_named(config: Make, tmp_path: Path):
    compare_methods(config("dense", factors=(1.0,)), tmp_path)
    file = tmp_path / "rows.jsonl"
    file.write_text("{}\n" + file.read_text())
    with pytest.raises(ValueError, match=r"rows\.jsonl, line 1 is broken"):
        compare_methods(config("dense", factors=(1.0,)), tmp_path)
