"""A subject from a file: what is read, and how its functions name themselves where they fail."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import nn

from dynarank.experiments.subject import Subject
from dynarank.experiments.user_file import read_subject

MODEL = "from torch import nn\n\n\ndef model():\n    return nn.Sequential(nn.Linear(3, 2))\n"


@pytest.fixture
def read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str], Subject]:
    """Return a reader of text as the file mine.py."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)

    def reader(text: str) -> Subject:
        Path("mine.py").write_text(text)
        return read_subject("mine.py")

    return reader


def test_a_model_is_enough(read: Callable[[str], Subject]):
    subject = read(MODEL)
    assert subject.name == "mine"
    assert isinstance(subject.model(), nn.Sequential)
    assert (subject.evaluate, subject.loss, subject.training_batches, subject.narrower) == (None, None, None, None)
    assert subject.calibration() is None
    assert subject.example() is None
    assert subject.scores(subject.model()) == {}


def test_everything_is_taken(read: Callable[[str], Subject]):
    subject = read(
        MODEL
        + "import torch\nmeasure = 'bleu'\nexample_batch = torch.ones(5, 3)\n"
        + "def evaluate(model): return {'other': 2, 'bleu': torch.tensor(30.0)}\n"
        + "def validate(model): return 29\n"
        + "def training_batches(seed): return [torch.full((2, 3), seed)]\n"
        + "def loss(outputs, batch): return outputs.sum()\n"
        + "def narrower(parameters): return nn.Linear(1, 1)\n"
        + "def forward(model, batch): return model(2 * batch)\n"
    )
    model = subject.model()
    assert (subject.measure, subject.higher_is_better) == ("bleu", True)
    assert subject.scores(model) == {"bleu": 30.0, "other": 2.0}
    assert next(iter(subject.scores(model))) == "bleu"
    assert subject.choice_score(model) == 29
    assert torch.equal(subject.forward(model, torch.ones(1, 3)), model(2 * torch.ones(1, 3)))
    assert [batch.tolist() for batch in subject.calibration() or []] == [[[0, 0, 0], [0, 0, 0]]]
    assert subject.example().shape == (5, 3)
    assert subject.training_batches is not None
    batches = subject.training_batches(4)
    assert [len(list(batches)), len(list(batches))] == [1, 1]  # a list can be gone through again


@pytest.mark.parametrize(
    ("measure", "higher"), [("accuracy", True), ("test_loss", False), ("perplexity", False), ("word error rate", False)]
)
def test_the_name_of_a_score_tells_its_direction(read: Callable[[str], Subject], measure: str, higher: bool):
    assert read(MODEL + f"measure = {measure!r}\n").higher_is_better == higher
    assert read(MODEL + f"measure = {measure!r}\nhigher_is_better = {not higher}\n").higher_is_better != higher


def test_imports_find_files_beside_it(read: Callable[[str], Subject]):
    Path("beside_mine.py").write_text("from torch import nn\n\nNET = nn.Linear(2, 2)\n")
    subject = read("def model():\n    from beside_mine import NET\n    return NET\n")
    assert isinstance(subject.model(), nn.Linear)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("measure = 'loss'\n", "mine.py defines no model(), which returns the trained network. Define it."),
        ("model = 3\n", "mine.py: model must be a function model(), got int."),
        ("def model(width): ...\n", "mine.py: model must be callable as model(), got model(width)."),
        (
            MODEL + "def loss(outputs): ...\n",
            "mine.py: loss must be callable as loss(outputs, batch), got loss(outputs).",
        ),
        (
            MODEL + "measure = 3\n",
            "mine.py: measure must be a text and higher_is_better True or False, got 3 and None.",
        ),
    ],
)
def test_what_cannot_be_called_is_refused_at_once(read: Callable[[str], Subject], text: str, message: str):
    with pytest.raises(ValueError) as failure:
        read(text)
    assert str(failure.value) == message


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("1 / 0\n", "mine.py: the file failed: ZeroDivisionError: division by zero"),
        ("def model(:\n", "mine.py: the file failed: SyntaxError: "),
        (
            "import nothing_of_that_name\n",
            "mine.py: the file failed: ModuleNotFoundError: No module named 'nothing_of_",
        ),
    ],
)
def test_a_file_that_cannot_be_run_keeps_its_message(read: Callable[[str], Subject], text: str, message: str):
    with pytest.raises(RuntimeError) as failure:
        read(text)
    assert str(failure.value).startswith(message)


def test_functions_name_themselves_and_keep_their_message(read: Callable[[str], Subject]):
    subject = read(
        "def model(): return 3\n"
        "def evaluate(model): raise KeyError('column')\n"
        "def validate(model): return 'good'\n"
        "def loss(outputs, batch): return outputs.nothing\n"
        "def calibration_batches(): return 3\n"
        "def training_batches(seed):\n    yield 1\n    raise OSError('disk')\n"
    )
    net = nn.Linear(2, 2)
    assert subject.loss is not None
    assert subject.training_batches is not None
    for call, message in (
        (subject.model, "mine.py: model() failed: TypeError: it must return a torch.nn.Module, got int"),
        (lambda: subject.scores(net), "mine.py: evaluate() failed: KeyError: 'column'"),
        (lambda: subject.choice_score(net), "mine.py: validate() failed: ValueError: could not convert string"),
        (lambda: subject.loss(1, 2), "mine.py: loss() failed: AttributeError: 'int' object has no attribute 'nothing'"),
        (subject.calibration, "mine.py: calibration_batches() failed: TypeError: it must return batches: "),
        (lambda: list(subject.training_batches(0)), "mine.py: training_batches() failed: OSError: disk"),
        (lambda: subject.forward(net, torch.ones(1, 5)), "mine.py: the network failed: RuntimeError: mat1 and mat2"),
    ):
        with pytest.raises(RuntimeError) as failure:
            call()
        assert str(failure.value).startswith(message)
        assert failure.value.__cause__ is not None


def test_a_measure_that_is_not_among_the_scores_is_named(read: Callable[[str], Subject]):
    subject = read(MODEL + "def evaluate(model): return {'f1': 0.5}\n")
    with pytest.raises(ValueError, match="mine: evaluate returned f1, but measure is 'accuracy'"):
        subject.scores(subject.model())
