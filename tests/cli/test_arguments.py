"""Words become settings, and wrong words one line."""

import dataclasses
from typing import Any

import pytest

from dynarank.cli.arguments import Methods, Report, Train, parse
from dynarank.experiments import TrainConfig


def settings(*words: str) -> dict[str, Any]:
    command = parse(["train", *words])
    assert isinstance(command, Train)
    return command.settings


def test_without_options_everything_is_as_in_the_configuration():
    command = parse(["train"])
    assert command == Train(dataclasses.asdict(TrainConfig()), resume=None, json=False)


def test_every_setting_has_an_option():
    words = (
        "--data synthetic --data-dir d --model linear --method oialr --integrator parallel_bug "
        "--integrator-options a=1 b=2 --rank-policy fixed --rank-options rank=3 --tolerance 0.2 --start dense "
        "--start-rank 3 "
        "--warmup-steps 7 --planted-rank 5 --noise 0.5 --epochs 2 --batch-size 16 --lr 0.1 --base-lr 1e-3 "
        "--freeze 0.4 --every 9 --include-head --seed 8 --device cpu --threads 2 --out o --no-compare"
    )
    expected = TrainConfig(
        data="synthetic",
        data_dir="d",
        model="linear",
        method="oialr",
        integrator="parallel_bug",
        integrator_options=("a=1", "b=2"),
        rank_policy="fixed",
        rank_options=("rank=3",),
        tolerance=0.2,
        start="dense",
        start_rank=3,
        warmup_steps=7,
        planted_rank=5,
        noise=0.5,
        epochs=2,
        batch_size=16,
        lr=0.1,
        base_lr=1e-3,
        freeze=0.4,
        every=9,
        include_head=True,
        seed=8,
        device="cpu",
        threads=2,
        out="o",
        compare=False,
    )
    assert settings(*words.split()) == dataclasses.asdict(expected)
    assert settings("--hidden", "8", "4", "--budget", "0.1") == dataclasses.asdict(
        TrainConfig(hidden=(8, 4), budget=0.1)
    )


def test_start_has_a_second_name_since_torchrun_takes_the_first():
    assert settings("--begin", "dense") == settings("--start", "dense")


def test_resume_and_json_are_no_settings():
    command = parse(["train", "--resume", "runs/a", "--json"])
    assert isinstance(command, Train)
    assert (command.resume, command.json) == ("runs/a", True)
    assert command.settings == dataclasses.asdict(TrainConfig())


def test_the_other_commands():
    assert parse(["report", "runs/a"]) == Report("runs/a")
    assert parse(["report", "runs/a", "--out", "x.html"]) == Report("runs/a", "x.html")
    assert parse(["methods"]) == Methods()


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("train --epochs two", "--epochs: must be a whole number, got 'two'. See dynarank train --help."),
        ("train --every 1.5", "--every: must be a whole number, got '1.5'. See dynarank train --help."),
        ("train --lr fast", "--lr: must be a number, got 'fast'. See dynarank train --help."),
        ("train --epoch 3", "Unrecognized options: --epoch, 3. See dynarank train --help."),
        (
            "train --start middle",
            "invalid choice 'middle' for argument '--begin/--start'. Expected one of ('low', 'dense').",
        ),
        ("trian", "Unrecognized options: trian. See dynarank --help."),
        ("report", "Missing from dynarank report: RUN"),
    ],
)
def test_wrong_words_are_told_in_one_line(words: str, message: str):
    with pytest.raises(ValueError) as failure:
        parse(words.split())
    assert str(failure.value).startswith(message)
    assert "\n" not in str(failure.value)


@pytest.mark.parametrize("words", [[], ["--help"], ["train", "--help"]])
def test_help_is_no_failure(words: list[str], capsys: pytest.CaptureFixture[str]):
    with pytest.raises(SystemExit) as stop:
        parse(words)
    assert not stop.value.code
    assert "usage: dynarank" in capsys.readouterr().out


def test_the_help_explains_every_option(capsys: pytest.CaptureFixture[str]):
    with pytest.raises(SystemExit):
        parse(["train", "--help"])
    shown = capsys.readouterr().out
    for field in dataclasses.fields(TrainConfig):
        assert f"--{field.name.replace('_', '-')}" in shown
    assert "absolute_tail|budget|capped" in shown
    assert "(default: by data set)" in shown
    assert "None" not in shown
