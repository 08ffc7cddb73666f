"""The command ``analyze`` on the folder of a run: its last look, and how it fails."""

import io
from pathlib import Path

import pytest
import torch
from rich.console import Console
from torch import nn

from dynarank.cli import analyze as command
from dynarank.cli.main import main
from dynarank.history import History
from dynarank.stability import WeightWatch


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Return the folder of a run with three looks; the current folder is the one above."""
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(30, 20), nn.ReLU(), nn.Linear(20, 10))
    watch = WeightWatch(model, History(tmp_path / "run" / "history.jsonl"))
    for step in (0, 50, 100):
        watch.look(step, lr=0.02)
        with torch.no_grad():
            for p in model.parameters():
                p.add_(0.02 * torch.randn_like(p))
    return tmp_path / "run"


@pytest.mark.parametrize("word", ["run", "run/", "run/history.jsonl"])
def test_the_last_look_is_told_with_how_it_moved(run: Path, word: str, capsys: pytest.CaptureFixture[str]):
    assert main(["analyze", word]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].split()[:4] == ["layer", "shape", "S", "overlap"]
    assert lines[1].startswith("0  ") and "20 x 30" in lines[1]
    assert lines[3].startswith("2  ") and "10 x 20" in lines[3]
    moved = History.read(run / "history.jsonl").looks
    assert f"{moved[2]['layers']['0']['stability'] - moved[1]['layers']['0']['stability']:+.4f}" in lines[2]
    assert lines[6].startswith("Look 3, at step 100 (learning rate 0.02), compared with step 50;")
    assert max(map(len, lines)) <= 120


def test_a_record_under_another_name_is_one_too(run: Path, capsys: pytest.CaptureFixture[str]):
    (run / "history.jsonl").rename("seed0.jsonl")
    assert main(["analyze", "seed0.jsonl"]) == 0
    assert "10 x 20" in capsys.readouterr().out


def test_on_a_terminal_the_table_is_drawn(run: Path, monkeypatch: pytest.MonkeyPatch):
    written = io.StringIO()

    def console(**options: object) -> Console:
        return Console(file=written, force_terminal=True, width=200, highlight=False)

    monkeypatch.setattr("rich.console.Console", console)
    assert main(["analyze", "run"]) == 0
    for word in ("20 x 30", "above noise", "pays to", "Look 3, at step 100"):
        assert word in written.getvalue()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ("--weights x", "--weights belongs to weights and models, not to a run"),
        ("--budgets 0.3", "--budgets belongs to weights and models, not to a run"),
        ("--include fc1", "--include belongs to weights and models, not to a run"),
        ("--exclude fc1", "--exclude belongs to weights and models, not to a run"),
        ("--timed 1", "--timed belongs to weights and models, not to a run"),
        ("--data-dir x", "--data-dir belongs to weights and models, not to a run"),
        ("--json x", "--json belongs to weights and models, not to a run"),
        (
            "--html x",
            "--html belongs to weights and models; `dynarank report` makes the page of a run; got",
        ),
    ],
)
@pytest.mark.usefixtures("run")
def test_options_for_weights_are_refused(options: str, message: str, capsys: pytest.CaptureFixture[str]):
    assert main(["analyze", "run", *options.split()]) == 2
    shown = capsys.readouterr()
    assert shown.out == "" and shown.err.count("\n") == 1 and message in shown.err


def test_a_run_without_looks_says_how_to_take_them(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    History(tmp_path / "history.jsonl").log(step=1, loss=0.5)
    assert main(["analyze", str(tmp_path)]) == 2
    message = capsys.readouterr().err
    assert "history.jsonl holds no look at the weights. A training loop records them with" in message
    assert "WeightWatch(model, history)" in message and message.count("\n") == 1


def test_a_broken_record_names_its_line(run: Path, capsys: pytest.CaptureFixture[str]):
    file = run / "history.jsonl"
    file.write_text('{"kind": "look", "step": 1}\n' + file.read_text())
    assert main(["analyze", "run"]) == 2
    assert "history.jsonl, line 1: not a record (look record without layers)" in capsys.readouterr().err


def test_a_built_in_task_goes_before_a_folder_of_its_name(run: Path):
    assert command._history_in("run") == Path("run/history.jsonl")
    run.rename(run.with_name("lenet5"))
    assert command._history_in("lenet5") is None


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("notes.txt", b"no weights here, only words", "notes.txt is no file of weights: it starts with b'no weigh'."),
        ("short.bin", b"abc", "short.bin is no file of weights: it starts with b'abc'."),
        ("picture.png", b"\x89PNG\r\n\x1a\n" + bytes(40), "picture.png is no file of weights"),
        ("array.npy", b"\x93NUMPY\x01\x00" + bytes(40), "array.npy is no file of weights"),
        ("empty.pt", b"", "empty.pt is empty."),
        ("archive.zip", b"PK\x05\x06" + bytes(18), "archive.zip is damaged or no file of torch.save."),
        ("settings.json", b'{"a": 1}', "settings.json is no index of shards"),
    ],
)
def test_a_file_that_holds_no_weights_is_told_in_one_line(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    name: str,
    content: bytes,
    message: str,
):
    monkeypatch.chdir(tmp_path)
    Path(name).write_bytes(content)
    assert main(["analyze", name]) == 2
    shown = capsys.readouterr()
    assert shown.out == "" and shown.err.count("\n") == 1 and message in shown.err


def test_a_folder_without_run_and_weights_is_told(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    (tmp_path / "report.html").write_text("<html>")
    assert main(["analyze", str(tmp_path)]) == 2
    assert "the folder holds no file of weights. Give" in capsys.readouterr().err
