"""The command ``calibrate``: what it measures, keeps and prints, and how it fails."""

import json
from pathlib import Path

import pytest
import torch

from dynarank.calibration import load_calibration, this_machine
from dynarank.cli.arguments import Calibrate, parse
from dynarank.cli.main import main


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("DYNARANK_CACHE_DIR", str(tmp_path / "cache"))
    return tmp_path / "cache"


def test_every_setting_has_an_option():
    words = "--device cuda:1 --threads 3 --seconds 7.5 --json"
    assert parse(["calibrate", *words.split()]) == Calibrate(device="cuda:1", threads=3, seconds=7.5, json=True)
    assert parse(["calibrate"]) == Calibrate()


@pytest.mark.slow
def test_what_was_measured_is_printed_and_kept(capsys: pytest.CaptureFixture[str], cache: Path):
    assert main(["calibrate", "--seconds", "0.01", "--threads", "1", "--json"]) == 0
    *text, last = capsys.readouterr().out.splitlines()
    kept = load_calibration(this_machine())
    assert kept is not None
    assert json.loads(last) == json.loads(json.dumps(kept.as_dict()))
    (file,) = (cache / "calibration").iterdir()
    assert f"kept in {file}" in text
    assert str(kept).splitlines() == text[: len(str(kept).splitlines())]
    assert any(line.startswith("linear") and "512 x 512" in line for line in text)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("--seconds -1", "seconds must be above 0, got -1.0."),
        ("--threads 0", "--threads must be at least 1, got 0."),
        ("--device gpu", "device must be one that torch can use here, such as cpu, got 'gpu': "),
        ("--seconds soon", "seconds: must be a number, got 'soon'"),
    ],
)
def test_a_failure_is_one_line(words: str, message: str, capsys: pytest.CaptureFixture[str], cache: Path):
    threads = torch.get_num_threads()
    assert main(["calibrate", *words.split()]) == 2
    told = capsys.readouterr()
    assert told.out == "" and len(told.err.splitlines()) == 1
    assert message in told.err
    assert torch.get_num_threads() == threads
    assert not cache.exists()
