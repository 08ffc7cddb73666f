"""``dynarank bench``: what it reads, prints, keeps, and how it fails."""

import json
from collections.abc import Callable
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any

import pytest
import torch

from dynarank.cli import bench as bench_command
from dynarank.cli.bench import Bench
from dynarank.cli.main import ACTIONS, main
from dynarank.experiments.bench import measuring, quick
from dynarank.experiments.bench.config import METHODS, BenchConfig, as_command

CASE = """
from torch import nn

from dynarank.experiments.bench.cases.base import AbstractCase, Series, mean_square


class Mine(AbstractCase):
    '''A single layer.'''

    def series(self):
        network = lambda: nn.Sequential(nn.Linear(7, 9))
        return [Series("9 x 7", network, (5, 7), mean_square, [{"0": 2}], inference=(3,))]
"""


@pytest.fixture
def mine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    Path("mine.py").write_text(CASE)
    monkeypatch.setattr(measuring, "BLOCK", 1e-5)
    monkeypatch.setattr(measuring, "CYCLE", 2)
    monkeypatch.setattr(quick, "SUBSET", (("mine.py", "9 x 7", "2"),))
    monkeypatch.setattr(quick, "SECONDS", 0.01)
    return "mine.py"


@pytest.fixture
def read(monkeypatch: pytest.MonkeyPatch) -> Callable[..., Bench]:
    """Return what the command line reads, without carrying it out."""
    commands: list[Bench] = []
    monkeypatch.setitem(ACTIONS, Bench, commands.append)

    def read(*words: str) -> Bench:
        assert main(["bench", *words]) == 0
        return commands.pop()

    return read


def test_every_setting_has_an_option(read: Callable[..., Bench]):
    expected = BenchConfig(
        ("tiny", "layers"), methods=("tangent_muon:momentum=0.95", "spectron,plain_factors"), threads=3, seconds=0.5
    )
    words = "tiny layers --methods tangent_muon:momentum=0.95 spectron,plain_factors --threads 3 --seconds 0.5"
    assert read(*words.split(), "--device", "cpu", "--out", "o", "--json") == Bench(
        asdict(expected), out="o", json=True
    )
    assert read(*as_command(expected, "o").split()[2:]) == Bench(asdict(expected), out="o")
    assert read() == Bench(asdict(BenchConfig()))
    assert read("--quick", "--save", "--list") == Bench(asdict(BenchConfig()), list=True, quick=True, save=True)


def test_the_help_explains_every_option(capsys: pytest.CaptureFixture[str]):
    with pytest.raises(SystemExit):
        main(["bench", "--help"])
    shown = capsys.readouterr().out
    for field in (*fields(BenchConfig), *fields(Bench)):
        assert field.name in ("cases", "settings") or f"--{field.name}" in shown
    assert "CASE ..." in shown
    assert "None" not in shown


def test_cases_and_methods_are_listed(mine: str, capsys: pytest.CaptureFixture[str]):
    assert main(["bench", "--list"]) == 0
    lines = capsys.readouterr().out.splitlines()
    for name in ("layers", "mlp5120", "tiny", *METHODS):
        assert any(line.split()[:1] == [name.partition(":")[0]] for line in lines)
    assert not Path("runs").exists()


def test_a_benchmark_prints_its_tables_and_goes_on(mine: str, capsys: pytest.CaptureFixture[str]):
    words = ["bench", mine, "--methods", "plain_factors", "--seconds", "0.01"]
    assert main([*words, "--json"]) == 0
    shown = capsys.readouterr()
    *lines, last = shown.out.splitlines()
    outcome = json.loads(last)
    assert outcome["out"] == "runs/bench-1"
    (row,) = outcome["rows"]
    for entry in row["entries"]:
        assert any(f" {entry['method']} " in line for line in lines)
    assert "Factorised: 0. Everything else is dense." in lines
    for name in ("table.md", "mine.svg", "index.html"):
        assert Path(outcome["out"], name).is_file()
    assert shown.err.splitlines() == ["mine.py, 9 x 7: measuring", f"1 of 1: mine.py, 9 x 7: {row['rounds']} rounds"]
    assert main([*words, "--out", outcome["out"]]) == 0
    again = capsys.readouterr()
    assert (again.out.splitlines(), again.err) == (lines, "")


def test_the_quick_benchmark_fails_where_something_became_slower(mine: str, capsys: pytest.CaptureFixture[str]):
    words = ["bench", "--quick", "--methods", "plain_factors"]
    assert main([*words, "--save"]) == 0
    assert capsys.readouterr().out.splitlines()[-1] == f"written to {quick.COMMITTED}"
    figures = json.loads(quick.COMMITTED.read_text())
    for factor, code in ((100, 0), (0.01, 1)):
        changed = {name: factor * ratio for name, ratio in figures["ratios"].items()}
        quick.COMMITTED.write_text(json.dumps({**figures, "ratios": changed}))
        assert main(words) == code
        shown = capsys.readouterr()
        assert len(shown.out.splitlines()) == 3
        assert ("dynarank: 3 of 3 ratios are worse than committed: " in shown.err) == bool(code)
    assert not Path("runs").exists()


def test_an_interruption_says_how_to_go_on(
    mine: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    def interrupt(*args: Any, **options: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(bench_command, "measure_all", interrupt)
    assert main(["bench", mine]) == 130
    assert capsys.readouterr().err.splitlines() == [
        "",
        "runs/bench-1 keeps the series that have ended. Go on with: dynarank bench mine.py --out runs/bench-1",
        "dynarank: interrupted.",
    ]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("teeny", "unknown case 'teeny'. Available: convs, layers, "),
        ("mine.py --methods tangent_moun", "unknown method 'tangent_moun'. Available: "),
        ("mine.py --methods tangent_muon:speed=3", "method 'tangent_muon' has no option 'speed'."),
        ("mine.py mine.py", "cases must differ from each other, got mine.py mine.py."),
        ("mine.py --methods spectron,spectron", "methods must differ from each other, got spectron spectron."),
        ("mine.py --methods dense,spectron", "methods are integrators, got dense, which is always there. Leave it"),
        ("mine.py --device tpu", "device must be cpu or cuda, got 'tpu'."),
        ("mine.py --seconds 0", "seconds must be above 0, got 0.0."),
        ("mine.py --threads 0", "threads must be at least 1, got 0."),
        ("mine.py --save", "--save writes the figures of --quick. Give both, or name a folder with --out."),
        ("mine.py --quick --save", "--quick has cases of its own, got mine.py. Leave them or --quick away."),
        ("--quick --out o", "--quick keeps nothing. Leave --out and --json away."),
        ("--quick", "there are no figures to compare with: experiments/results/bench/quick.json is missing. "),
        ("no.py", "there is no file no.py."),
        ("mine.py --out full", "out must be a new or an empty folder or one of a benchmark, got full."),
        ("mine.py --rounds 3", "Unrecognized options"),
    ],
)
def test_mistakes_get_one_line_and_leave_nothing(
    mine: str, words: str, message: str, capsys: pytest.CaptureFixture[str]
):
    Path("full").mkdir()
    Path("full", "theirs").touch()
    assert main(["bench", *words.split()]) == 2
    shown = capsys.readouterr()
    assert (shown.out, shown.err.count("\n")) == ("", 1)
    assert shown.err.startswith(f"dynarank: error: {message}")
    assert not list(Path().glob("runs/*"))
    assert [path.name for path in Path("full").iterdir()] == ["theirs"]


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without a GPU")
def test_a_device_that_is_not_there(mine: str, capsys: pytest.CaptureFixture[str]):
    assert main(["bench", mine, "--device", "cuda"]) == 2
    assert capsys.readouterr().err.startswith("dynarank: error: device cuda needs a GPU that torch can use, and there")


def test_a_method_in_a_file_of_ones_own(mine: str, capsys: pytest.CaptureFixture[str]):
    Path("own.py").write_text(
        "from dynarank.integrators.plain_factors import PlainFactors\n\n\nclass Own(PlainFactors):\n    pass\n"
    )
    assert main(["bench", mine, "--methods", "own.py", "--seconds", "0.01"]) == 0
    assert any(" own.py " in line for line in capsys.readouterr().out.splitlines())
