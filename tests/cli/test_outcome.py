"""The table says what the outcome says."""

from typing import Any

from dynarank.cli.outcome import lines

ROWS = [
    {
        "name": name,
        "test_accuracy": accuracy,
        "parameters": parameters,
        "percent_of_dense": percent,
        "seconds": 12.3,
        "ms_per_step": 4.5,
        "lr": 0.1,
    }
    for name, accuracy, parameters, percent in (
        ("low rank", 0.9733, 27_914, 4.95),
        ("dense", 0.98, 563_722, 100.0),
        ("narrower dense", 0.9767, 27_875, 4.94),
    )
]
OUTCOME: dict[str, Any] = {
    "test_accuracy": 0.9733,
    "test_loss": 0.1,
    "parameters": 27_914,
    "dense_parameters": 563_722,
    "seconds": 12.3,
    "steps": 1000,
    "ranks": {"fc1": 12, "fc2": 7},
    "first_ranks": {"fc1": 2, "fc2": 2},
    "full_ranks": {"fc1": 64, "fc2": 512},
    "kept_dense": {"head": "classifier head"},
    "planted_rank": None,
    "comparison": ROWS,
    "verdict": ["The narrower dense network is better."],
    "out": "runs/a",
    "report": "runs/a/report.html",
}


def test_the_table_of_three_networks():
    assert lines(OUTCOME) == [
        "",
        "network         test accuracy  parameters  of dense  training  per step",
        "low rank              97.33 %      27,914    4.95 %    12.3 s   4.50 ms",
        "dense                 98.00 %     563,722  100.00 %    12.3 s   4.50 ms",
        "narrower dense        97.67 %      27,875    4.94 %    12.3 s   4.50 ms",
        "",
        "The narrower dense network is better.",
        "",
        "ranks   fc1 2 → 12 of 64, fc2 2 → 7 of 512",
        "dense   head: classifier head",
        "run     runs/a",
        "report  runs/a/report.html",
    ]


def test_without_a_comparison_there_is_one_row():
    shown = lines(OUTCOME | {"comparison": None, "verdict": []})
    assert shown[1:4] == [
        "network   test accuracy  parameters  of dense  training  per step",
        "low rank        97.33 %      27,914    4.95 %    12.3 s  12.30 ms",
        "",
    ]


def test_regression_shows_the_loss_and_the_planted_rank():
    changes = {"test_accuracy": None, "planted_rank": 5, "comparison": None, "verdict": [], "report": None}
    shown = lines(OUTCOME | changes)
    assert "test loss" in shown[1]
    assert " 0.1 " in shown[2]
    assert shown[4].endswith("(planted: 5)")
    assert not any(line.startswith("report") for line in shown)
