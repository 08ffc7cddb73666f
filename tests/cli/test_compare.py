"""``dynarank compare``: what it reads, prints, keeps, and how it fails."""

import json
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any

import pytest

from dynarank.cli import compare as compare_command
from dynarank.cli.arguments import Compare, parse
from dynarank.cli.main import main
from dynarank.experiments.contest.config import ContestConfig, as_command

QUICK = ["--steps", "10", "--seeds", "0", "1", "--factors", "0.5", "1", "--seconds", "0", "--size", "0.3"]


def test_every_setting_has_an_option():
    words = (
        "gpt --methods dense,narrower tangent_muon:momentum=0.95 --rank 4 8 --seeds 1 2 --steps 9 --factors 0.5 2 "
        "--lrs dense=1,2 --tune-seed 50 --tune-steps 5 --seconds 0.5 --jobs 3 --data-dir d --out o --json"
    )
    expected = ContestConfig(
        "gpt",
        methods=("dense,narrower", "tangent_muon:momentum=0.95"),
        rank=(4, 8),
        seeds=(1, 2),
        steps=9,
        factors=(0.5, 2.0),
        lrs=("dense=1,2",),
        tune_seed=50,
        tune_steps=5,
        seconds=0.5,
        jobs=3,
        data_dir="d",
    )
    command = parse(["compare", *words.split()])
    assert command == Compare(asdict(expected), out="o", json=True)
    assert parse(as_command(expected, "o").split()[1:]) == Compare(asdict(expected), out="o")
    for size in ({"size": (0.1, 0.2)}, {"tolerance": (0.1,)}, {"rank_policy": ("noise_edge",)}):
        (name, values), *_ = size.items()
        given = parse(["compare", "gpt", f"--{name.replace('_', '-')}", *map(str, values)])
        assert given == Compare(asdict(ContestConfig("gpt", **size)))


def test_the_help_explains_every_option(capsys: pytest.CaptureFixture[str]):
    with pytest.raises(SystemExit):
        main(["compare", "--help"])
    shown = capsys.readouterr().out
    for field in (*fields(ContestConfig), *fields(Compare)):
        assert field.name in ("task", "settings") or f"--{field.name.replace('_', '-')}" in shown
    assert "TASK" in shown
    assert "None" not in shown


def test_tasks_and_methods_are_listed(tiny: str, capsys: pytest.CaptureFixture[str]):
    assert main(["compare", "--list"]) == 0
    lines = capsys.readouterr().out.splitlines()
    for name in ("lenet5", tiny, "narrower", "tangent_muon", "plain_factors_adamw"):
        assert any(line.split()[:1] == [name] for line in lines)
    assert not Path("runs").exists()


def test_a_comparison_prints_its_table_and_keeps_its_pages(tiny: str, capsys: pytest.CaptureFixture[str]):
    words = ["compare", tiny, "--methods", "dense,tangent_muon", *QUICK]
    assert main([*words, "--json"]) == 0
    shown = capsys.readouterr()
    *lines, last = shown.out.splitlines()
    outcome = json.loads(last)
    assert outcome["out"] == "runs/compare-tiny-1"
    head = next(line for line in lines if line.startswith("method"))
    assert all(name in head for name in ("test accuracy", "of dense", "FLOPs", "memory", "step / dense"))
    for row in outcome["rows"]:
        assert any(line.startswith(row["method"]) and f"{100 * row['mean']:.2f} ± " in line for line in lines)
    for name in ("table.md", "table.csv", "results.json", "index.html"):
        assert Path(outcome["out"], name).is_file()
        assert any(line.endswith(f"{outcome['out']}/{name}") for line in lines)
    assert [line.split(": ")[0] for line in shown.err.splitlines()[:8]] == [f"{n} of 8" for n in range(1, 9)]
    assert main([*words, "--out", outcome["out"]]) == 0
    again = capsys.readouterr()
    assert again.err == ""
    assert again.out.splitlines()[: len(lines)] == lines


def test_an_interruption_says_how_to_go_on(
    tiny: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    def interrupt(*args: Any, **options: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(compare_command, "compare_methods", interrupt)
    assert main(["compare", tiny, "--methods", "dense", "--seeds", "1"]) == 130
    assert capsys.readouterr().err.splitlines() == [
        "",
        "runs/compare-tiny-1 keeps the runs that have ended. Go on with: "
        "dynarank compare tiny --methods dense --seeds 1 --out runs/compare-tiny-1",
        "dynarank: interrupted.",
    ]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("", "name a task or a Python file that defines one; `dynarank compare --list` shows names."),
        ("teeny", "unknown task 'teeny'. Available: etth1, gpt, gpt_small, lenet5, "),
        ("tiny --methods dense,tangent_moun", "unknown method 'tangent_moun'. Available: "),
        ("tiny --methods ,", "methods must name at least one contestant; "),
        ("tiny --methods dense,dense", "methods must differ from each other, got dense dense."),
        ("tiny --size 3", "size must be between 0 and 1, got 3.0."),
        ("tiny --rank 0", "rank must be at least 1, got 0."),
        ("tiny --rank-policy noise_egde", "gauge_fixed_muon at noise_egde: unknown rank policy 'noise_egde'."),
        ("tiny --seeds 100", "tune_seed must be none of the seeds that are reported, got 100 among 100."),
        ("tiny --factors 0", "factors must be above 0, got 0.0."),
        ("tiny --lrs dense=1,2", "every method is tuned over as many learning rates: lrs of dense must be 5, "),
        ("tiny --lrs dens=1,2,3,4,5", "lrs are given for 'dens', which is none of the methods dense narrower "),
        ("tiny --lrs dense=fast", "lrs must be METHOD=LR,LR,LR with numbers above 0, got 'dense=fast'."),
        ("tiny --jobs 0", "jobs must be at least 1, got 0."),
        ("tiny --seconds -1", "seconds must be at least 0, got -1.0."),
        ("tiny --size 0.3", "narrower at 30.0 %: there is no narrower network of at least 586 and fewer than 1,955 "),
        ("no.py", "there is no file no.py."),
        ("tiny --out full", "out must be a new or an empty folder or one of a comparison, got full."),
    ],
)
def test_mistakes_get_one_line_and_leave_nothing(
    tiny: str, words: str, message: str, capsys: pytest.CaptureFixture[str]
):
    Path("full").mkdir()
    Path("full", "theirs").touch()
    extra = ["--methods", "dense"] if "full" in words else []
    assert main(["compare", *words.split(), *extra]) == 2
    shown = capsys.readouterr()
    assert (shown.out, shown.err.count("\n")) == ("", 1)
    assert shown.err.startswith(f"dynarank: error: {message}")
    assert not list(Path().glob("runs/*"))
    assert [path.name for path in Path("full").iterdir()] == ["theirs"]


def test_a_task_in_a_file_of_ones_own(tmp_path: Path, tiny: str, capsys: pytest.CaptureFixture[str]):
    Path("mine.py").write_text("import beside\n\n\nclass Mine(beside.Noise):\n    training_steps = 4\n")
    Path("beside.py").write_text(
        "from dynarank.experiments.tasks import TASKS\n\n\nclass Noise(TASKS['tiny']):\n    training_steps = 3\n"
    )
    assert main(["compare", "mine.py", "--methods", "dense", *QUICK[2:]]) == 0
    assert capsys.readouterr().out.splitlines()[-1] == "html  runs/compare-mine-1/index.html"
    assert json.loads(Path("runs/compare-mine-1/contest.json").read_text())["steps"] == 4
    Path("none.py").write_text("task = 3\n")
    Path("broken.py").write_text("1 / 0\n")
    for name, message in (
        ("none.py", "none.py must define one final class that derives from AbstractTask, found 0."),
        ("broken.py", "broken.py: the file failed: ZeroDivisionError: division by zero"),
    ):
        assert main(["compare", name]) == 2
        assert capsys.readouterr().err == f"dynarank: error: {message}\n"
