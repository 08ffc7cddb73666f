"""A benchmark as a whole: its folder, what is done again and what is not, its pages, and the quick comparison."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from dynarank.experiments.bench import quick, results
from dynarank.experiments.bench.bench import _key, line_up, measure_all, pinned
from dynarank.experiments.bench.config import BenchConfig, as_command
from dynarank.experiments.bench.ratios import Spread


def bench(config: BenchConfig, out: str = "out") -> tuple[dict[str, list[dict[str, Any]]], list[str]]:
    told: list[str] = []
    rows = measure_all(config, line_up(config), Path(out), tell=lambda news: told.append(f"{news.done} {news.series}"))
    return rows, told


@pytest.fixture
def config(mine: str) -> BenchConfig:
    return BenchConfig((mine,), methods=("plain_factors",), seconds=0.01)


def test_series_are_kept_and_not_repeated(config: BenchConfig):
    rows, told = bench(config)
    assert told == ["0 batch 8", "1 batch 8", "1 batch 6", "2 batch 6"]
    lines = Path("out/rows.jsonl").read_text().splitlines()
    assert [json.loads(line)["series"] for line in lines] == ["batch 8", "batch 6"]
    assert bench(config) == (rows, [])
    Path("out/rows.jsonl").write_text("".join(f"{line}\n" for line in lines[:1]) + lines[1][:50])  # cut short
    again, told = bench(config)
    assert told == ["1 batch 6", "2 batch 6"]
    assert again["mine.py"][0] == rows["mine.py"][0]


@pytest.mark.parametrize("change", [{"methods": ("plain_factors,spectron",)}, {"seconds": 0.02}])
def test_other_settings_make_other_rows(config: BenchConfig, change: dict[str, Any]):
    rows, _ = bench(config)
    others, told = bench(replace(config, **change))
    assert len(told) == 4
    assert [row["key"] for row in others["mine.py"]] != [row["key"] for row in rows["mine.py"]]
    assert bench(config) == (rows, [])


def test_threads_are_pinned_and_make_other_rows(config: BenchConfig):
    (series, *_) = line_up(config)[0]["mine.py"].series()
    assert _key(config, "mine.py", series) != _key(replace(config, threads=2), "mine.py", series)
    with pinned(2):
        assert torch.get_num_threads() == 2
    assert torch.get_num_threads() == 1


def test_a_folder_of_something_else_is_left_alone(config: BenchConfig):
    Path("out").mkdir()
    Path("out/theirs").touch()
    with pytest.raises(ValueError, match="out must be a new or an empty folder or one of a benchmark, got out"):
        bench(config)
    assert [path.name for path in Path("out").iterdir()] == ["theirs"]


def test_the_pages_hold_every_number(config: BenchConfig):
    rows, _ = bench(config)
    sections = results.summarise(line_up(config)[0], rows)
    written = results.write_pages(Path("out"), sections, rows["mine.py"], as_command(config, "out"))
    assert [path.name for path in written] == ["table.md", "mine.svg", "index.html"]
    lines = Path("out/table.md").read_text().splitlines()
    assert "`dynarank bench mine.py --methods plain_factors --seconds 0.01 --out out`" in lines
    for row in rows["mine.py"]:
        for entry in row["entries"]:
            start = f"| {row['series']} | {entry['rank'] or '-'} | {entry['method']} | "
            steps = [line for line in lines if len(line.split("|")) == len(results.STEP_HEAD) + 2]
            (line,) = [line for line in steps if line.startswith(start)]
            assert f"{entry['to_dense']['mean']:.3f}" in line
    assert "* Factorised: 0. Everything else is dense." in lines
    assert any("threads 1" in line and "load average" in line for line in lines)
    page = Path("out/index.html").read_text()
    assert page.count("<svg") == 2 and "batch 6" in page


def test_published_ratios_stand_beside_what_was_measured(config: BenchConfig):
    rows, _ = bench(config)
    (section,) = results.summarise(line_up(config)[0], rows)
    places = [tuple(cells[:3]) for cells in section.tables[0]]
    assert places.count(("batch 8", "2", "theirs (quoted)")) == 1
    at = places.index(("batch 8", "2", "theirs (quoted)"))
    assert places[at - 1] == ("batch 8", "2", "plain_factors")
    assert section.tables[0][at][results.STEP_HEAD.index("beside dense")] == "1.25"
    assert "theirs is quoted: from a paper." in section.notes


def test_what_failed_is_told(config: BenchConfig):
    rows, _ = bench(config)
    entry = rows["mine.py"][0]["entries"][-1]
    lost = {"method": entry["method"], "rank": entry["rank"], "failed": "RuntimeError: out of order"}
    broken = {**rows["mine.py"][0], "entries": [*rows["mine.py"][0]["entries"][:-1], lost]}
    (section,) = results.summarise(line_up(config)[0], {"mine.py": [broken]})
    assert "plain_factors at rank 2 of batch 8 was left out: RuntimeError: out of order" in section.notes


def test_ratios_that_say_nothing_are_marked():
    assert results.ratio_text(Spread(1.2, 1.1, 1.3, 1.1, 1.3, 1.2), 1.05) == "1.200"
    assert results.ratio_text(Spread(1.2, 1.1, 1.3, 1.1, 1.3, 1.2), 1.25) == "1.200 ="


def figures(path: Path) -> dict[str, float]:
    return json.loads(path.read_text())["ratios"]


def test_the_quick_figures_are_saved_and_compared_with(mine: str):
    config, told = BenchConfig(methods=("plain_factors",)), []
    saved = quick.save_quickly(config, tell=told.append)
    assert figures(quick.COMMITTED) == saved
    label = "mine.py, batch 8, rank 2"
    assert list(saved) == [
        f"{label}, plain, beside dense",
        f"{label}, plain_factors, beside dense",
        f"{label}, plain_factors, beside plain",
    ]
    assert len(told) == 1
    easy = {**saved, f"{label}, plain_factors, beside dense": 1e-3, f"{label}, plain, beside dense": 1e3}
    del easy[f"{label}, plain_factors, beside plain"]
    quick.COMMITTED.write_text(json.dumps({"ratios": easy}))
    fast, slow, new = quick.check_quickly(config, tell=told.append)
    assert not fast.is_worse and str(fast).endswith(": ok")
    assert slow.is_worse and str(slow).endswith(": WORSE")
    assert not new.is_worse and str(new).endswith("no committed figure")


@pytest.mark.parametrize(("ratio", "is_worse"), [(1.2, False), (1.26, True), (0.5, False)])
def test_noise_and_slack_multiply(ratio: float, is_worse: bool):
    alone = Spread(1.0, 1.0, 1.0, 0.95, 1.08, 1.0)
    entries = [
        {"method": "dense", "rank": ""},
        {"method": "dense again", "rank": "", "to_dense": vars(alone)},
        {"method": "plain again", "rank": "2", "to_plain": vars(alone)},
        {"method": "plain", "rank": "2", "to_dense": {**vars(alone), "median": ratio}},
    ]
    row = {"case": "a", "series": "b", "entries": entries}
    (check,) = quick._checks(row, {"a, b, rank 2, plain, beside dense": 1.0})
    assert check.limit == pytest.approx(1.08 * 1.15)
    assert check.is_worse == is_worse


def test_the_subset_is_there():
    quick_subset = [
        (case, series.name, str(next(iter(ranks.values()))))
        for case in ("tiny", "layers")
        for series in line_up(BenchConfig((case,)))[0][case].series()
        for ranks in series.ranks
    ]
    assert set(quick.SUBSET) <= set(quick_subset)


def test_without_figures_the_message_says_how_to_make_them(mine: str):
    with pytest.raises(ValueError, match=r"quick.json is missing.*dynarank bench --quick --save"):
        quick.check_quickly(BenchConfig(), tell=print)
