"""A comparison is fair: as many learning rates for everybody, and a narrower network that is large enough."""

import json
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from dynarank.experiments.contest.config import ContestConfig
from dynarank.experiments.contest.contest import compare_methods
from dynarank.experiments.contestants import _recipes
from dynarank.factorize import deployed_parameters
from dynarank.report.standings import Standing, Standings

Make = Callable[..., ContestConfig]
Read = Callable[[Path], list[dict[str, Any]]]


def row_of(found: Standings, method: str) -> Standing:
    (row,) = (row for row in found.rows if row.method == method)
    return row


def test_every_contestant_is_tuned_over_as_many_learning_rates(config: Make, rows_of: Read, tmp_path: Path):
    compare_methods(config("dense,narrower", "tangent_muon", size=(0.4, 0.6)), tmp_path)
    counted = Counter((row["method"], str(row["size"]), row["final"]) for row in rows_of(tmp_path))
    assert len(counted) == 2 * 5
    assert set(counted.values()) == {2}
    assert {(row["final"], row["seed"]) for row in rows_of(tmp_path)} == {(False, 100), (True, 0), (True, 1)}


def test_only_runs_that_are_reported_look_at_the_test_part(tiny: Any, config: Make, rows_of: Read, tmp_path: Path):
    compare_methods(config("dense", "tangent_muon"), tmp_path)
    assert all(("test" in row) == row["final"] for row in rows_of(tmp_path))
    assert tiny.evaluated == {"test": 4, "validation": 8}


def test_validation_chooses_and_the_end_of_the_grid_is_told(config: Make, rows_of: Read, tmp_path: Path):
    found, _ = compare_methods(config("dense", factors=(1e-4, 1e-3, 1.0)), tmp_path)
    trials = {row["lr"]: row["validation"]["accuracy"] for row in rows_of(tmp_path) if not row["final"]}
    dense = row_of(found, "dense")
    assert dense.tuning == trials
    assert dense.lr == max(trials, key=lambda lr: trials[lr]) == 1.0
    assert dense.edge == "highest"
    assert {row["lr"] for row in rows_of(tmp_path) if row["final"]} == {1.0}
    assert any("dense (highest)" in note for note in found.notes())
    inside, _ = compare_methods(config("dense", factors=(1e-3, 1.0, 1e3)), tmp_path / "inside")
    assert (row_of(inside, "dense").lr, row_of(inside, "dense").edge) == (1.0, "")


def test_one_learning_rate_needs_no_tuning(config: Make, rows_of: Read, tmp_path: Path):
    found, _ = compare_methods(config("dense", factors=(1.0,)), tmp_path)
    assert [row["final"] for row in rows_of(tmp_path)] == [True, True]
    assert row_of(found, "dense").edge == ""


def test_shorter_runs_may_choose_the_learning_rate(config: Make, rows_of: Read, tmp_path: Path):
    compare_methods(config("dense", steps=8, tune_steps=3), tmp_path)
    assert {(row["final"], row["steps"]) for row in rows_of(tmp_path)} == {(False, 3), (True, 8)}


@pytest.mark.parametrize(
    "size", [{"size": (0.5,)}, {"size": (), "rank": (3,)}, {"size": (), "tolerance": (0.3,)}], ids=str
)
def test_a_narrower_network_is_never_smaller_than_a_low_rank_one(
    tiny: Any, config: Make, rows_of: Read, tmp_path: Path, size: dict[str, Any]
):
    methods = ("narrower", "narrower_muon", "tangent_muon", "plain_factors_adamw", "uniform_ranks")
    compare_methods(config(*methods, factors=(1.0,), **size), tmp_path)
    stored: dict[str, set[int]] = {name: set() for name in methods}
    for row in rows_of(tmp_path):
        stored[row["method"]].add(row["parameters"])
    (narrow,) = stored["narrower"] | stored["narrower_muon"]
    assert narrow >= max(stored["tangent_muon"] | stored["plain_factors_adamw"] | stored["uniform_ranks"])
    widths = [deployed_parameters(tiny().net(width)) for width in range(1, 16)]
    asked = next(run["parameters"] for run in map(json.loads, keys_of(tmp_path)) if run["method"] == "narrower")
    assert narrow == min(size for size in widths if size >= asked)


def keys_of(folder: Path) -> list[str]:
    return [json.loads(line)["key"] for line in (folder / "rows.jsonl").read_text().splitlines() if "method" in line]


@pytest.mark.parametrize("parameters", range(21, 540, 13))
def test_the_narrower_network_is_the_smallest_that_is_large_enough(tiny: Any, parameters: int):
    sizes = [deployed_parameters(tiny().net(width)) for width in range(1, 16)]
    wanted = [size for size in sizes if size >= parameters]
    if wanted:
        assert deployed_parameters(_recipes.narrower(tiny(), parameters)) == min(wanted)
    else:
        with pytest.raises(ValueError, match="there is no narrower network of at least"):
            _recipes.narrower(tiny(), parameters)
