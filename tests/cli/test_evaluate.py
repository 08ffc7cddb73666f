"""``dynarank evaluate`` shows what ``dynarank compress`` has kept."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from dynarank.cli.main import main

QUICK = ("--seconds", "0.01", "--batch-sizes", "2", "--json")


def test_a_kept_model_has_the_scores_it_had(write_task: Callable[..., str], capsys: pytest.CaptureFixture[str]):
    name = write_task()
    assert main(["compress", name, "--budget", "0.4", "--recover", "20", "--out", "small", *QUICK]) == 0
    kept = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert main(["evaluate", name, "--compressed", "small", *QUICK]) == 0
    *lines, last = capsys.readouterr().out.splitlines()
    loaded = json.loads(last)
    assert [row["name"] for row in loaded["rows"]] == ["as given", "compressed"]
    assert loaded["rows"][1]["scores"] == kept["rows"][-1]["scores"]
    assert loaded["rows"][1]["costs"]["parameters"] == kept["rows"][-1]["costs"]["parameters"]
    assert lines[0].split()[:2] == ["network", "accuracy"]


def test_a_task_that_gives_one_network_again_and_again(
    write_task: Callable[..., str], capsys: pytest.CaptureFixture[str]
):
    name = write_task(("def model():", "@__import__('functools').cache\ndef model():"))
    assert main(["compress", name, "--budget", "0.4", "--out", "small", *QUICK]) == 0
    assert main(["evaluate", name, "--compressed", "small", *QUICK]) == 0
    given, compressed = json.loads(capsys.readouterr().out.splitlines()[-1])["rows"]
    assert compressed["costs"]["parameters"] < given["costs"]["parameters"] / 2


def test_a_folder_without_a_model_is_named(write_task: Callable[..., str], capsys: pytest.CaptureFixture[str]):
    Path("empty").mkdir()
    assert main(["evaluate", write_task(), "--compressed", "empty"]) == 2
    assert capsys.readouterr().err.startswith("dynarank: error: empty")
