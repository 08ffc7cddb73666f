"""``dynarank compress`` on a file of one's own: what it prints, what it keeps, how it fails."""

import json
from collections.abc import Callable
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any

import pytest

from dynarank.cli.arguments import Compress, parse
from dynarank.cli.main import main
from dynarank.experiments.compress_config import CompressConfig

WriteTask = Callable[..., str]
QUICK = ("--seconds", "0.01", "--batch-sizes", "1", "4")


def compress(*words: str, capsys: pytest.CaptureFixture[str]) -> tuple[list[str], dict[str, Any]]:
    """Run the command and return what it printed and its outcome."""
    assert main(["compress", *words, *QUICK, "--json"]) == 0
    *lines, last = capsys.readouterr().out.splitlines()
    return lines, json.loads(last)


def test_every_setting_has_an_option():
    words = (
        "mine.py --budget 0.5 --measure flops --method svd --forms matrix --rank-multiple 8 --include-head "
        "--faster-only --recover 9 --distil --lr 0.1 --integrator parallel_bug --only core --student --batch-sizes 1 2 "
        "--seconds 3 --seed 4 --weights w --data-dir d --out o --json"
    )
    expected = CompressConfig(
        budget=0.5,
        measure="flops",
        method="svd",
        forms=("matrix",),
        rank_multiple=8,
        include_head=True,
        faster_only=True,
        recover=9,
        distil=True,
        lr=0.1,
        integrator="parallel_bug",
        only=("core",),
        student=True,
        batch_sizes=(1, 2),
        seconds=3.0,
        seed=4,
    )
    command = Compress("mine.py", asdict(expected), weights="w", data_dir="d", out="o", json=True)
    assert parse(["compress", *words.split()]) == command
    tolerated = parse(["compress", "mine.py", "--tolerate", "0.01"])
    assert tolerated == Compress("mine.py", asdict(CompressConfig(tolerate=0.01)))


def test_the_help_explains_every_option(capsys: pytest.CaptureFixture[str]):
    with pytest.raises(SystemExit):
        main(["compress", "--help"])
    shown = capsys.readouterr().out
    for field in (*fields(CompressConfig), *fields(Compress)):
        assert field.name in ("task", "settings") or f"--{field.name.replace('_', '-')}" in shown
    assert "TASK" in shown
    assert "None" not in shown


def test_the_whole_proof_has_a_row_for_every_network(write_task: WriteTask, capsys: pytest.CaptureFixture[str]):
    words = (write_task(), "--budget", "0.5", "--recover", "50", "--distil", "--student")
    lines, outcome = compress(*words, capsys=capsys)
    names = [row["name"] for row in outcome["rows"]]
    assert names == ["as given", "after truncation", "after recovery", "narrower dense"]
    sizes = [row["costs"]["parameters"] for row in outcome["rows"]]
    assert sizes[1] == sizes[2] == outcome["report"]["parameters_after"] <= sizes[0] / 2
    assert sizes[3] <= sizes[1]
    assert all(row["scores"].keys() == {"accuracy", "loss"} for row in outcome["rows"])
    assert all(row["costs"]["latency"].keys() == {"1", "4"} for row in outcome["rows"])
    assert outcome["recovery"]["steps"] == 50
    head = next(line for line in lines if line.startswith("network"))
    for column in ("accuracy", "loss", "parameters", "of given", "FLOPs at 1", "time at 1", "time at 4", "memory at 4"):
        assert column in head
    assert all(any(line.startswith(name) for line in lines) for name in names)


def test_the_result_is_kept_and_the_next_one_beside_it(write_task: WriteTask, capsys: pytest.CaptureFixture[str]):
    name = write_task()
    _, first = compress(name, "--budget", "0.5", capsys=capsys)
    _, second = compress(name, "--budget", "0.4", capsys=capsys)
    assert (first["out"], second["out"]) == ("runs/compressed-mine-1", "runs/compressed-mine-2")
    kept = {path.name for path in Path(first["out"]).iterdir()}
    assert kept == {"dynarank.json", "model.safetensors", "report.json", "table.md"}
    report = json.loads(Path(first["out"], "report.json").read_text())
    assert report == {key: value for key, value in first.items() if key != "out"}
    assert "| as given |" in Path(first["out"], "table.md").read_text()


def test_a_model_alone_is_enough_for_its_size(write_task: WriteTask, capsys: pytest.CaptureFixture[str]):
    Path("alone.py").write_text("from torch import nn\n\ndef model():\n    return nn.Sequential(nn.Linear(50, 40))\n")
    lines, outcome = compress("alone.py", "--budget", "0.5", "--include-head", capsys=capsys)
    assert [row["scores"] for row in outcome["rows"]] == [{}, {}]
    assert outcome["rows"][1]["costs"]["flops"] is None
    assert [note.split(":")[0] for note in outcome["notes"]] == [
        "No score",
        "Truncated by the weights alone",
        "No time, FLOPs or memory",
    ]
    assert all(note in lines for note in outcome["notes"])


def test_a_tolerance_finds_the_size(write_task: WriteTask, capsys: pytest.CaptureFixture[str]):
    lines, outcome = compress(write_task(), "--tolerate", "0.02", capsys=capsys)
    before, after = (row["scores"]["accuracy"] for row in outcome["rows"])
    assert after >= before - 0.02001
    assert outcome["rows"][1]["costs"]["parameters"] < outcome["rows"][0]["costs"]["parameters"]
    assert outcome["trials"][0]["fraction"] == 1
    assert any("chosen by evaluate(model) itself" in line for line in lines)


def test_predicted_times_stand_beside_measured_ones(write_task: WriteTask, capsys: pytest.CaptureFixture[str]):
    name = write_task(("network(width=40)", "network(width=200)"))
    _, outcome = compress(name, "--budget", "0.5", "--faster-only", capsys=capsys)
    assert outcome["predicted_at"] == 64
    assert outcome["rows"][0]["costs"]["latency"].keys() == {"1", "4", "64"}
    assert outcome["rows"][1]["predicted"] > 0


def test_a_built_in_task_takes_weights(tiny: str, capsys: pytest.CaptureFixture[str]):
    assert main(["pretrain", tiny, "--out", "trained"]) == 0
    _, outcome = compress(tiny, "--weights", "trained", "--budget", "0.6", "--recover", "10", capsys=capsys)
    assert outcome["out"] == "runs/compressed-tiny-1"
    assert outcome["rows"][0]["scores"]["accuracy"] > 0.5


@pytest.mark.parametrize(
    ("changes", "words", "message"),
    [
        ((), "", "give either a budget or what is tolerated, got neither."),
        ((), "--budget 0.5 --tolerate 0.1", "give either a budget or what is tolerated, got budget 0.5 and tolerate"),
        ((), "--budget 0.5 --lr 0.1", "lr belongs to recovery. Give the number of steps with recover."),
        ((), "--budget 0.5 --measure size", "unknown measure 'size'. Available: bytes, flops, latency, parameters."),
        ((), "--budget 0.5 --weights w", "--weights belongs to the built-in tasks "),
        ((), "--budget 0.0001", "compress_: a budget of "),
        (
            (("def narrower", "def other"),),
            "--budget 0.5 --recover 9 --student",
            "student needs narrower(parameters), ",
        ),
        (
            (("def loss", "def cost"),),
            "--budget 0.5 --recover 9",
            "recover without distil needs loss(outputs, batch), ",
        ),
        ((("def loss", "def cost"),), "--budget 0.5", "mine.py: model() failed: NameError: name 'loss' is not"),
        ((("def evaluate", "def other"),), "--tolerate 0.1", "tolerate needs evaluate(model), which mine does not"),
        ((("def model", "def net"),), "--budget 0.5", "mine.py defines no model(), which returns the trained network."),
        (
            (("evaluate(model)", "evaluate()"),),
            "--budget 0.5",
            "mine.py: evaluate must be callable as evaluate(model), ",
        ),
    ],
)
def test_mistakes_get_one_line_and_leave_nothing(
    changes: Any, words: str, message: str, write_task: WriteTask, capsys: pytest.CaptureFixture[str]
):
    assert main(["compress", write_task(*changes), *words.split(), *QUICK]) == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert error.startswith(f"dynarank: error: {message}")
    assert not list(Path().glob("runs/*"))


def test_other_mistakes(tiny: str, capsys: pytest.CaptureFixture[str]):
    Path("full").mkdir()
    Path("full", "mine").touch()
    for words, message in (
        (
            f"{tiny} --budget 0.5",
            f"the built-in task {tiny} needs --weights FOLDER, a trained network. Make one with: ",
        ),
        (f"{tiny} --budget 0.5 --weights no", "no holds no checkpoint: manifest.json is missing."),
        (f"{tiny} --budget 0.5 --weights no --out full", "out must be a new or an empty folder, got full, which holds"),
        (
            "teeny --budget 0.5",
            "unknown task 'teeny'. Available: etth1, gpt, gpt_small, lenet5, mlp500, mlp784, resnet20, tiny, ",
        ),
        ("nowhere.py --budget 0.5", "there is no file nowhere.py. A task is a Python file that defines model(), or a "),
    ):
        assert main(["compress", *words.split()]) == 2
        assert capsys.readouterr().err.splitlines()[-1].startswith(f"dynarank: error: {message}")
    assert [path.name for path in Path("full").iterdir()] == ["mine"]
