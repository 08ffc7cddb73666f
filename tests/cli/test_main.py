"""Commands in this process: what they print, where, and how they fail."""

import json
import sys
from pathlib import Path
from typing import Any

import pytest

from dynarank.cli import train as train_command
from dynarank.cli.main import main
from dynarank.errors import NonFiniteGradientError
from dynarank.experiments import RunInterrupted
from dynarank.experiments.plain import standard
from dynarank.history import History

SIZE = ("--hidden", "16", "12", "--budget", "0.5", "--batch-size", "128", "--every", "4")
TINY = ("train", *SIZE, "--epochs", "3", "--seed", "3")
SYNTHETIC = ("train", "--data", "synthetic", "--planted-rank", "2", "--epochs", "2", "--no-compare")


@pytest.fixture(autouse=True)
def in_an_empty_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def test_the_last_line_of_the_output_is_the_outcome(capsys: pytest.CaptureFixture[str]):
    assert main([*TINY, "--json"]) == 0
    *table, last = capsys.readouterr().out.splitlines()
    outcome = json.loads(last)
    assert 0 < outcome["test_accuracy"] <= 1
    assert outcome["removed"] == 1 - outcome["parameters"] / outcome["dense_parameters"]
    assert outcome["ranks"].keys() == {"fc1", "fc2"}
    assert all(isinstance(rank, int) for rank in outcome["ranks"].values())
    assert (outcome["seed"], outcome["out"]) == (3, "runs/digits-mlp-1")
    assert outcome["loss"] > 0
    assert outcome["seconds"] > 0
    assert [row["name"] for row in outcome["comparison"]] == ["low rank", "dense", "narrower dense"]
    assert f"{100 * outcome['test_accuracy']:.2f} %" in table[2]
    assert any(line == "report  runs/digits-mlp-1/report.html" for line in table)
    assert Path(outcome["report"]).is_file()


def test_regression_has_a_loss_and_no_accuracy(capsys: pytest.CaptureFixture[str]):
    assert main([*SYNTHETIC, "--json"]) == 0
    outcome = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert outcome["test_accuracy"] is None
    assert outcome["test_loss"] > 0
    assert outcome["ranks"].keys() == {"fc"}
    assert outcome["comparison"] is None


def test_without_json_there_is_none(capsys: pytest.CaptureFixture[str]):
    assert main(SYNTHETIC) == 0
    assert "{" not in capsys.readouterr().out


def test_numbers_that_json_cannot_hold_are_null():
    outcome = {"loss": float("nan"), "comparison": [{"test_loss": float("inf"), "lr": 0.1}], "ranks": {"fc": 1}}
    expected = {"loss": None, "comparison": [{"test_loss": None, "lr": 0.1}], "ranks": {"fc": 1}}
    assert standard(outcome) == expected


def test_a_report_is_written_again(capsys: pytest.CaptureFixture[str]):
    main([*SYNTHETIC, "--out", "run"])
    capsys.readouterr()
    assert main(["report", "run", "--out", "page.html"]) == 0
    assert capsys.readouterr().out == "page.html\n"
    assert Path("page.html").is_file()


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("train --data mnst", "unknown data set 'mnst'. Available: digits, mnist, synthetic."),
        ("train --integrator bug", "unknown integrator 'bug'. Available: "),
        ("train --rank-options growth", "rank_options must be given as key=value, got 'growth'."),
        ("train --budget 0.001", "Budget: "),
        ("train --data mnist --data-dir nowhere", "load_mnist: directory 'nowhere' has no "),
        ("train --resume nowhere", "nowhere/checkpoint holds no checkpoint: manifest.json is missing."),
        ("train --resume nowhere --epochs 3", "a resumed run has the settings it was started with, got --epochs."),
        ("train --out /proc/here", "No such file or directory: /proc/here"),
        ("report nowhere", "write_report: no history at nowhere."),
    ],
)
def test_mistakes_get_one_line_and_exit_code_2(words: str, message: str, capsys: pytest.CaptureFixture[str]):
    assert main(words.split()) == 2
    shown = capsys.readouterr()
    assert shown.out == ""
    assert shown.err.startswith(f"dynarank: error: {message}")
    assert shown.err.count("\n") == 1
    assert not Path("runs").exists()


def test_a_traceback_is_there_for_those_who_want_it(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("DYNARANK_DEBUG", "1")
    with pytest.raises(ValueError, match="unknown data set"):
        main(["train", "--data", "mnst"])


@pytest.mark.parametrize(
    ("failure", "told"),
    [
        (RuntimeError("no mirror delivered it"), "no mirror delivered it"),
        (NonFiniteGradientError("fc1.A: not finite."), "fc1.A: not finite. A smaller --lr or --base-lr may help."),
        (PermissionError(13, "Permission denied", "runs"), "Permission denied: runs"),
    ],
)
def test_other_failures_are_told_alike(
    failure: Exception, told: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    def fail(*args: Any) -> None:
        raise failure

    monkeypatch.setattr(train_command, "train", fail)
    assert main(["train"]) == 2
    assert capsys.readouterr().err == f"dynarank: error: {told}\n"


def test_a_defect_of_ours_is_not_hidden(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(train_command, "train", lambda *args: [].missing)
    with pytest.raises(AttributeError):
        main(["train"])


def test_an_interrupted_run_says_how_to_go_on(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]):
    def interrupt(*args: Any) -> None:
        raise RunInterrupted(Path("runs/a"), 74)

    monkeypatch.setattr(train_command, "train", interrupt)
    assert main(["train"]) == 130
    expected = "dynarank: interrupted. Go on from step 74 with: dynarank train --resume runs/a\n"
    assert capsys.readouterr().err == expected


def test_an_interruption_outside_a_run_is_told(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]):
    def interrupt(*args: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(train_command, "train", interrupt)
    assert main(["train"]) == 130
    assert capsys.readouterr().err == "dynarank: interrupted.\n"


def test_a_finished_run_is_shown_again(capsys: pytest.CaptureFixture[str]):
    main([*SYNTHETIC, "--out", "run"])
    table = capsys.readouterr().out
    assert main(["train", "--resume", "run", "--json"]) == 0
    shown = capsys.readouterr()
    assert shown.out.startswith(table)
    assert shown.err == "warning: run has finished before; nothing is trained.\n"


def test_only_the_first_process_prints(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]):
    monkeypatch.setenv("RANK", "1")
    assert main(["train", "--data", "mnst"]) == 2
    assert main([*SYNTHETIC, "--json"]) == 0
    assert capsys.readouterr() == ("", "")


def test_a_missing_extra_is_named(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]):
    monkeypatch.setitem(sys.modules, "tyro", None)
    assert main(["methods"]) == 2
    assert capsys.readouterr().err == (
        'dynarank: error: this needs tyro, which is not installed. Run: pip install "dynarank[cli]"\n'
    )


def test_without_matplotlib_the_run_goes_through(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]):
    for name in [name for name in sys.modules if name.partition(".")[0] == "matplotlib"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    assert main([*SYNTHETIC, "--out", "run"]) == 0
    assert 'pip install "dynarank[viz]"' in capsys.readouterr().err
    assert History.read("run/history.jsonl").summary is not None
