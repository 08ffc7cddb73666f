"""The command ``analyze``: what it takes, prints and writes, and how it fails."""

import io
import json
import sys
from pathlib import Path

import pytest
import torch
from rich.console import Console
from safetensors.torch import save_file
from torch import Tensor, nn

from dynarank.checkpoint import save_model
from dynarank.cli import analyze as command
from dynarank.cli.main import main
from dynarank.experiments import tasks
from dynarank.models import LeNet5

MODEL = """
import helper
from torch import nn

def network():
    return nn.Sequential(nn.Linear(30, helper.WIDTH), nn.ReLU(), nn.Linear(helper.WIDTH, 10))

class Network(nn.Sequential):
    def __init__(self):
        super().__init__(nn.Linear(9, 8))

def broken():
    return 1 / 0

def number():
    return 3

constant = 3
"""
TASK = """
import torch
from torch import nn

def model():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(30, 20), nn.ReLU(), nn.Linear(20, 10))

def calibration_batches():
    torch.manual_seed(1)
    return [torch.randn(64, 30)]
"""


@pytest.fixture(autouse=True)
def in_a_folder_with_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("helper", "package", "package.models"):
        monkeypatch.delitem(sys.modules, name, raising=False)
    (tmp_path / "model.py").write_text(MODEL)
    (tmp_path / "helper.py").write_text("WIDTH = 20\n")
    (tmp_path / "task.py").write_text(TASK)
    (tmp_path / "package").mkdir()
    (tmp_path / "package" / "models.py").write_text("import torch\n\ndef net():\n    return torch.nn.Conv1d(6, 9, 3)\n")
    save_file({"fc.weight": torch.randn(20, 30), "head.weight": torch.randn(10, 20)}, "weights.safetensors")


def run(words: str, capsys: pytest.CaptureFixture[str]) -> list[str]:
    assert main(words.split()) == 0
    return capsys.readouterr().out.splitlines()


def test_a_file_of_weights_is_told_in_two_tables(capsys: pytest.CaptureFixture[str]):
    lines = run("analyze weights.safetensors --budgets 0.5 0.01 --exclude head", capsys)
    assert lines[0].split()[:3] == ["layer", "kind", "shape"]
    assert [line.split()[0] for line in lines[1:3]] == ["fc.weight", "head.weight"]
    assert lines[2].endswith("named in exclude_modules")
    assert lines[-2].startswith("50 %")
    assert "cannot be met" in lines[-1]


def test_files_are_written_where_they_are_asked_for(capsys: pytest.CaptureFixture[str]):
    lines = run("analyze weights.safetensors --json out/found.json --html page.html", capsys)
    assert lines[-2:] == ["json    out/found.json", "page    page.html"]
    assert [layer["name"] for layer in json.loads(Path("out/found.json").read_text())["layers"]] == [
        "fc.weight",
        "head.weight",
    ]
    assert Path("page.html").read_text().startswith("<!DOCTYPE html>")


@pytest.mark.parametrize(
    ("word", "layers"),
    [("model.py:network", ["0", "2"]), ("model.py:Network", ["0"]), ("package.models:net", ["(the"])],
)
def test_a_function_returns_the_model(word: str, layers: list[str], capsys: pytest.CaptureFixture[str]):
    path = list(sys.path)
    lines = run(f"analyze {word}", capsys)
    assert [line.split()[0] for line in lines[1 : len(layers) + 1]] == layers
    assert sys.path == path


def test_weights_are_loaded_into_the_model_of_a_function(capsys: pytest.CaptureFixture[str]):
    model = nn.Sequential(nn.Linear(30, 20), nn.ReLU(), nn.Linear(20, 10))
    with torch.no_grad():
        model[0].weight.copy_(torch.ones(20, 1) @ torch.randn(1, 30))
    torch.save(model.state_dict(), "trained.pt")
    save_model("trained", model)
    for weights in ("trained.pt", "trained"):
        line = run(f"analyze model.py:network --weights {weights}", capsys)[1]
        assert line.split()[6:9] == ["1", "1", "1"]  # rank 1 holds 90, 95 and 99 %


def test_a_file_as_for_compress_brings_its_calibration(capsys: pytest.CaptureFixture[str]):
    lines = run("analyze task.py --timed 0.001", capsys)
    assert "sensitivity" in lines[0] and " ms " in lines[0]
    assert any(line.split()[:1] == ["budget"] and "speed-up" in line for line in lines)


@pytest.fixture
def small_task(monkeypatch: pytest.MonkeyPatch) -> None:
    def batches(task: object) -> list[tuple[Tensor, None]]:
        return [(torch.randn(8, 1, 28, 28, generator=torch.Generator().manual_seed(0)), None)]

    monkeypatch.setattr(tasks.TASKS["lenet5"], "calibration_batches", batches)


@pytest.mark.usefixtures("small_task")
def test_a_built_in_task_brings_its_calibration(capsys: pytest.CaptureFixture[str]):
    generator = torch.get_rng_state()
    assert main(["analyze", "lenet5", "--budgets", "0.5"]) == 0
    shown = capsys.readouterr()
    assert "sensitivity" in shown.out
    assert shown.err == "lenet5 has fresh weights here; give trained ones with --weights.\n"
    assert torch.equal(generator, torch.get_rng_state())
    save_model("trained", LeNet5())
    assert main(["analyze", "lenet5", "--weights", "trained", "--budgets", "0.5"]) == 0
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("nowhere.safetensors", "no weights at nowhere.safetensors: there is no such file. Give"),
        ("resnet18", "no weights at resnet18: there is no such file."),
        ("model.py:missing", "model.py has no function 'missing'. Give file.py:function or package.module:function"),
        ("model.py:constant", "model.py has no function 'constant'."),
        ("nowhere.py:net", "there is no file nowhere.py. Give"),
        ("no.such.package:net", "there is no module no.such.package. Give"),
        ("model.py:broken", "model.py:broken() failed: ZeroDivisionError: division by zero"),
        ("model.py:number", "model.py:number() must return a torch.nn.Module, got int."),
        (
            "model.py:network --weights weights.safetensors",
            "weights.safetensors does not fit Sequential: it has no '0.",
        ),
        ("weights.safetensors --weights x", "--weights needs a model to load them into; got it with weights.safe"),
        ("weights.safetensors --timed 1", "--timed needs calibration data, which built-in tasks"),
        (
            "weights.safetensors --data-dir x",
            "--data-dir belongs to the built-in tasks etth1, gpt, gpt_small, lenet5, mlp500, ",
        ),
        ("task.py --weights x", "--weights does not go with a file that loads its own; got it with task.py."),
        ("weights.safetensors --budgets 0", "budgets must be fractions in (0, 1] or numbers above 1, got 0.0."),
        ("weights.safetensors --budgets half", "--budgets: "),
        ("weights.safetensors --include fc7", "target_modules: 'fc7' matches no weight."),
        ("model.py:network --include fc7", "target_modules: 'fc7' matches no layer."),
    ],
)
def test_mistakes_get_one_line_and_exit_code_2(words: str, message: str, capsys: pytest.CaptureFixture[str]):
    assert main(["analyze", *words.split()]) == 2
    shown = capsys.readouterr()
    assert shown.out == ""
    assert shown.err.count("\n") == 1
    assert message in shown.err


def test_a_fault_in_an_imported_file_is_told_as_its_own(capsys: pytest.CaptureFixture[str]):
    Path("package/models.py").write_text("import not_installed_here\n")
    assert main(["analyze", "package.models:net"]) == 2
    assert "package.models failed: ModuleNotFoundError: No module named 'not_installed_here'" in capsys.readouterr().err


def test_on_a_terminal_the_tables_are_drawn(monkeypatch: pytest.MonkeyPatch):
    written = io.StringIO()

    def console(**options: object) -> Console:
        return Console(file=written, force_terminal=True, width=200, highlight=False)

    monkeypatch.setattr("rich.console.Console", console)
    assert main(["analyze", "weights.safetensors"]) == 0
    shown = written.getvalue()
    for word in ("fc.weight", "head.weight", "above noise", "layers cut", "pays to: largest rank"):
        assert word in shown


def test_without_rich_the_tables_are_plain_text(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]):
    monkeypatch.setitem(sys.modules, "rich.console", None)
    assert command._terminal() is None
    assert run("analyze weights.safetensors", capsys)[0].startswith("layer")


def test_the_help_explains_the_options(capsys: pytest.CaptureFixture[str]):
    with pytest.raises(SystemExit):
        main(["analyze", "--help"])
    shown = capsys.readouterr().out
    for option in ("--weights FILE", "--budgets", "--include", "--timed", "--json FILE", "--html FILE"):
        assert option in shown
