"""``dynarank pretrain`` trains a built-in task and keeps its network."""

from pathlib import Path

import pytest
import torch

from dynarank.checkpoint import load_model
from dynarank.cli.main import main
from dynarank.experiments.pretraining import pretrain
from dynarank.experiments.tasks import TASKS


def test_the_trained_network_is_kept(tiny: str, capsys: pytest.CaptureFixture[str]):
    assert main(["pretrain", tiny, "--steps", "50", "--seed", "3"]) == 0
    shown = capsys.readouterr()
    assert [line.split()[0] for line in shown.out.splitlines()] == ["validation", "test", "parameters", "weights"]
    assert "accuracy" in shown.out
    assert shown.err.startswith("training: step 50 of 50, loss ")
    model = TASKS[tiny]().model()
    info = load_model("runs/trained/tiny-3", model)
    again = pretrain(TASKS[tiny](), steps=50, seed=3)
    for kept, trained in zip(model.parameters(), again.parameters(), strict=True):
        assert torch.equal(kept, trained)
    metadata = info.extra["metadata"]
    assert (metadata["task"], metadata["steps"], metadata["seed"], metadata["parameters"]) == ("tiny", 50, 3, 1955)
    assert metadata["test"].keys() == {"loss", "accuracy"}


def test_a_fraction_trains_a_narrower_network(tiny: str, capsys: pytest.CaptureFixture[str]):
    assert main(["pretrain", tiny, "--steps", "2", "--fraction", "0.25"]) == 0
    assert "parameters  227\nweights     runs/trained/tiny-0-0.25\n" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("tiny --steps 0", "steps must be at least 1, got 0."),
        ("tiny --fraction 2", "fraction must be between 0 and 1, got 2.0."),
        (
            "teeny",
            "unknown task 'teeny'. Available: etth1, gpt, gpt_small, lenet5, mlp500, ",
        ),
        ("tiny --out here", "out must be a new or an empty folder, got here, which holds something."),
    ],
)
def test_mistakes_get_one_line(tiny: str, words: str, message: str, capsys: pytest.CaptureFixture[str]):
    Path("here").mkdir()
    Path("here", "theirs").touch()
    assert main(["pretrain", *words.split()]) == 2
    assert capsys.readouterr().err.startswith(f"dynarank: error: {message}")
    assert not Path("runs").exists() or not list(Path("runs").iterdir())
