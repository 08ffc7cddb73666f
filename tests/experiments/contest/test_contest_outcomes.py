"""Failures of one method stop no other, the pages say what the rows say, and costs are those of training steps."""

import csv
import json
import re
import statistics
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from dynarank.experiments.contest.config import ContestConfig
from dynarank.experiments.contest.contest import compare_methods
from dynarank.experiments.contest.costs import at_ranks_, measure_costs
from dynarank.experiments.contest.jobs import side_by_side
from dynarank.experiments.contest.run import Run
from dynarank.experiments.contestants import Size
from dynarank.factorize import factorize_
from dynarank.layers._factored import factored_layers, ranks_held
from dynarank.layers.base import low_rank_layers

Make = Callable[..., ContestConfig]
Read = Callable[[Path], list[dict[str, Any]]]

FAULTY = """
import torch
from dynarank.experiments.contestants import AbstractContestant


class Faulty(AbstractContestant):
    '''Fails in its third step.'''

    sized = False

    def lr(self, task):
        return 0.1

    def network(self, task, setting):
        return task.model()

    def optimizers(self, task, model, setting):
        optimizer, steps = torch.optim.SGD(model.parameters(), lr=setting.lr), []

        def fail(*given):
            steps.append(1)
            if len(steps) == 3:
                raise KeyError("momentum")

        optimizer.register_step_pre_hook(fail)
        return [optimizer]
"""


@pytest.fixture
def faulty(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """Return the path of a method that fails while it trains."""
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / "faulty.py").write_text(FAULTY)
    return str(tmp_path / "faulty.py")


# --- what goes wrong ---------------------------------------------------------------------------------------------


def test_a_method_that_fails_stops_no_other_and_is_tried_again(config: Make, tmp_path: Path, faulty: str):
    out = tmp_path / "out"
    found, _ = compare_methods(config(faulty, "dense"), out)
    broken, dense = found.rows
    assert (broken.method, broken.scores, broken.failure) == ("faulty", {}, "failed: KeyError: 'momentum'")
    assert len(dense.scores) == 2
    assert "faulty: failed: KeyError: 'momentum'" in (out / "table.md").read_text()
    Path(faulty).write_text(FAULTY.replace("len(steps) == 3", "False"))
    mended, _ = compare_methods(config(faulty, "dense"), out)
    assert mended.rows[0].failure == ""
    assert len(mended.rows[0].scores) == 2
    assert mended.rows[1].scores == dense.scores


def test_a_learning_rate_that_diverges_is_not_chosen(config: Make, rows_of: Read, tmp_path: Path):
    found, _ = compare_methods(config("dense,tangent_muon", factors=(1.0, 1e30)), tmp_path)
    assert all(row.lr == min(row.tuning) for row in found.rows)
    assert all(row.tuning[max(row.tuning)] is None and not row.failure for row in found.rows)
    diverged = [row for row in rows_of(tmp_path) if "diverged" in row]
    assert len(diverged) == 2
    before = (tmp_path / "rows.jsonl").read_text()
    compare_methods(config("dense,tangent_muon", factors=(1.0, 1e30)), tmp_path)
    assert (tmp_path / "rows.jsonl").read_text() == before  # it would diverge again


def test_divergence_everywhere_is_told(config: Make, tmp_path: Path):
    found, _ = compare_methods(config("dense", "dense_adamw", lrs=("dense=1e30,1e31",)), tmp_path)
    assert found.rows[0].failure.startswith("diverged at every learning rate: the loss is nan at step ")
    assert (found.rows[0].lr, found.rows[0].scores, found.missing) == (None, {}, 0)
    assert len(found.rows[1].scores) == 2
    alone, _ = compare_methods(config("dense", factors=(1e30,)), tmp_path / "alone")
    assert alone.rows[0].diverged == 2
    assert alone.rows[0].failure.startswith("2 of 2 runs diverged: ")
    assert "0 of 2, 2 diverged" in (tmp_path / "alone" / "table.md").read_text()


def test_who_follows_networks_that_failed_is_told_so(config: Make, tmp_path: Path):
    chosen = config("tangent_muon,narrower", size=(), tolerance=(0.3,), factors=(1e30,))
    found, _ = compare_methods(chosen, tmp_path)
    assert found.rows[1].failure == "its size follows low-rank networks, and none of them has ended."


@pytest.mark.parametrize(
    ("methods", "changes", "message"),
    [
        ("dense,dens", {}, "unknown method 'dens'. Available: "),
        ("dense:lr=3", {}, "method 'dense' has no option 'lr'."),
        ("augmented_bug:steps=3", {}, "integrator 'augmented_bug' has no option 'steps'."),
        ("narrower", {"size": (0.99,)}, "narrower at 99.0 %: there is no narrower network of at least 525"),
        ("tangent_muon", {"size": (0.1,)}, "tangent_muon at 10.0 %: 53 parameters are too few"),
        ("plain_factors_adamw", {"size": (0.1,)}, "plain_factors_adamw at 10.0 %: 53 parameters are too few"),
        ("narrower", {"size": (), "tolerance": (0.1,)}, "narrower takes its size from low-rank networks, and none"),
        ("tangent_muon", {"size": (), "rank": (50,)}, "factorize_ replaced no layer"),
        ("no.py", {}, "there is no file no.py."),
    ],
)
def test_what_cannot_be_is_refused_before_anything_is_trained(
    config: Make, tiny: Any, tmp_path: Path, methods: str, changes: dict[str, Any], message: str
):
    with pytest.raises(ValueError, match=re.escape(message)):
        compare_methods(config(methods, **changes), tmp_path / "o")
    assert not (tmp_path / "o").exists()
    assert not tiny.evaluated


# --- pages -------------------------------------------------------------------------------------------------------


def test_the_pages_hold_the_numbers_of_the_rows(config: Make, rows_of: Read, tmp_path: Path):
    _, written = compare_methods(config("dense,narrower", "tangent_muon"), tmp_path)
    assert [path.name for path in written] == ["table.md", "table.csv", "results.json", "index.html"]
    tests: dict[str, list[float]] = {}
    for row in rows_of(tmp_path):
        if row["final"]:
            tests.setdefault(row["method"], []).append(row["test"]["accuracy"])
    markdown, text, page = (tmp_path / name for name in ("table.md", "table.csv", "index.html"))
    *lines, again = csv.DictReader(text.read_text().splitlines())
    data = json.loads((tmp_path / "results.json").read_text())
    assert [line["method"] for line in lines] == [row["method"] for row in data["rows"]] == list(tests)
    for line, row in zip(lines, data["rows"], strict=True):
        mean, deviation = statistics.fmean(tests[line["method"]]), statistics.stdev(tests[line["method"]])
        assert float(line["mean"]) == row["mean"] == pytest.approx(mean)
        assert float(line["deviation"]) == row["deviation"] == pytest.approx(deviation)
        assert list(row["scores"].values()) == tests[line["method"]]
        shown = f"{100 * mean:.2f} ± {100 * deviation:.2f} %"
        assert shown in markdown.read_text()
        assert shown in page.read_text()
        assert float(line["step_low"]) <= float(line["step_median"]) <= float(line["step_high"])
    assert lines[0]["step_median"] == "1.0"
    assert again["method"] == "dense again (A/A)"
    assert float(again["step_median"]) == data["again"]["median"] > 0
    assert "| dense again (A/A) | " in markdown.read_text()
    assert data["command"] in markdown.read_text()


def test_the_page_loads_nothing_and_draws_what_there_is(config: Make, tmp_path: Path):
    compare_methods(config("dense,dense_adamw", "tangent_muon", size=(0.5, 0.7)), tmp_path)
    page = (tmp_path / "index.html").read_text()
    assert not re.search(r"(src|href)=[\"'](?!#)|url\((?!#)|@import|https?://|<script", page)
    assert page.count("<svg") == 2
    assert "default-src 'none'" in page
    assert all(name in page for name in ("dense_adamw", "tangent_muon", "validation", "How to reproduce"))
    assert str(tmp_path) not in page.replace(f"--out {tmp_path}", "")


def test_without_matplotlib_everything_else_is_written(
    config: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    monkeypatch.setitem(sys.modules, "matplotlib.style", None)
    _, written = compare_methods(config("dense", factors=(1.0,)), tmp_path)
    assert [path.suffix for path in written] == [".md", ".csv", ".json"]
    assert 'pip install "dynarank[viz]"' in caplog.text


# --- costs -------------------------------------------------------------------------------------------------------


def test_costs_are_those_of_training_steps_at_the_final_ranks(tiny: Any):
    runs = {
        "low": (Run("tiny", "tangent_muon", Size(fraction=0.5), None, 0.02, 0, 24, True), {"0": 4, "2": 1}),
        "adamw": (Run("tiny", "dense_adamw", None, None, 0.01, 0, 24, True), {}),
    }
    costs = measure_costs(tiny(), runs, seconds=0.0)
    assert costs.keys() == {"dense", "dense again", "low", "adamw"}
    dense, low = 2 * (12 * 16 + 16 * 16 + 16 * 3), 2 * (4 * (12 + 16) + 1 * (16 + 16) + 16 * 3)
    assert [costs[name]["flops"] for name in ("dense", "dense again", "low")] == [dense, dense, low]
    numbers, bytes_each = 531, 4
    # Weights, gradients and the state of the optimizer are alive together; so are more than the activations.
    assert costs["dense"]["memory"] >= 3 * numbers * bytes_each
    assert costs["adamw"]["memory"] >= 4 * numbers * bytes_each
    assert costs["dense"]["memory"] == costs["dense again"]["memory"] < costs["adamw"]["memory"]
    assert all(cost["rounds"] >= 7 and cost["seconds"] > 0 for cost in costs.values())
    assert set(costs["dense"]["ratio"].values()) == {1.0}
    assert all(c["ratio"]["low"] <= c["ratio"]["median"] <= c["ratio"]["high"] for c in costs.values())


def test_layers_are_brought_to_any_rank():
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.Flatten(), nn.Linear(32, 20), nn.Linear(20, 4))
    factorize_(model, rank=2)
    at_ranks_(model, {"0": 5, "2": 1})
    assert {name: layer.rank for name, layer in low_rank_layers(model).items()} == {"0": 5, "2": 1}
    model(torch.ones(2, 3, 4, 4)).sum().backward()


@pytest.mark.parametrize(("form", "ranks"), [("tucker", (5, 2)), ("tucker4", (4, 3, 2, 1))])
def test_tensors_are_brought_to_any_ranks(form: Any, ranks: tuple[int, ...]):
    model = nn.Sequential(nn.Conv2d(3, 8, 3))
    factorize_(model, rank=2, conv_form=form, include_head=True)
    names = [f"0[{mode}]" for mode in ("out", "in", "height", "width")]
    at_ranks_(model, dict(zip(names, ranks, strict=False)))
    assert ranks_held(factored_layers(model)) == dict(zip(names, ranks, strict=False))
    weight = model[0].weight
    assert 0.01 < weight.square().mean().sqrt() < 1
    model(torch.ones(2, 3, 4, 4)).sum().backward()


@pytest.mark.parametrize("form", ["spatial", "tucker", "tucker4"])
def test_convolutions_of_any_form_are_compared(
    form: str, tiny: Any, config: Make, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
):
    def net(self: Any, width: int) -> nn.Module:
        first = [nn.Unflatten(1, (3, 2, 2)), nn.Conv2d(3, 4, 2, padding=1), nn.ReLU(), nn.Conv2d(4, width, 3)]
        return nn.Sequential(*first, nn.ReLU(), nn.Flatten(), nn.Linear(width, 3))

    monkeypatch.setattr(tiny, "net", net)
    methods = (f"tangent_heavy_ball:conv_form={form}", f"uniform_ranks:conv_form={form}", "narrower")
    found, _ = compare_methods(config(*methods), tmp_path / "c", tell=lambda news: None)
    rows = {row.method.partition(":")[0]: row for row in found.rows}
    assert all(len(row.scores) == 2 and not row.failure for row in rows.values())
    low = rows["tangent_heavy_ball"]
    assert low.parameters and low.parameters <= 0.5 * found.dense_parameters
    assert low.flops and low.step
    modes = {"spatial": (), "tucker": ("[out]", "[in]"), "tucker4": ("[out]", "[in]", "[height]", "[width]")}
    assert {f"3{mode}" for mode in modes[form] or ("",)} <= low.ranks.keys()


# --- processes ---------------------------------------------------------------------------------------------------

TASK = """
import importlib.util, sys

spec = importlib.util.spec_from_file_location("contest_conftest", {path!r})
module = importlib.util.module_from_spec(spec)
sys.modules["contest_conftest"] = module
spec.loader.exec_module(module)


class Same(module.Tiny):
    '''The tiny task in a file of its own.'''
"""


@pytest.mark.slow
def test_processes_side_by_side_do_what_one_does(rows_of: Read, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / "mine.py").write_text(TASK.format(path=str(Path(__file__).with_name("conftest.py"))))
    settings: dict[str, Any] = {"methods": ("dense", "tangent_muon"), "size": (0.5,), "seeds": (0,), "seconds": 0.0}
    for jobs in (1, 3):
        config = ContestConfig(str(tmp_path / "mine.py"), **settings, factors=(0.5, 1.0), jobs=jobs)
        compare_methods(config, tmp_path / str(jobs))
    one, three = (sorted(rows_of(tmp_path / str(jobs)), key=lambda row: row["key"]) for jobs in (1, 3))
    assert one == three


@pytest.mark.slow
def test_a_process_that_dies_has_failed_and_none_is_left(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / "dying.py").write_text("import os\nos._exit(7)\n")
    (tmp_path / "hanging.py").write_text("import time\ntime.sleep(1000)\n")
    runs = [Run(str(tmp_path / f"{name}.py"), "dense", None, None, 1.0, 0, 2, True) for name in ("dying", "hanging")]
    outcomes = side_by_side(runs, 2, data_dir=None)
    run, outcome = next(outcomes)
    assert (run, outcome) == (runs[0], {"failed": "its process ended with code 7: "})
    outcomes.close()
    left = subprocess.run(["ps", "-eo", "args"], capture_output=True, text=True, check=True).stdout
    assert str(tmp_path / "hanging.py") not in left
