"""The list holds what discovery finds, and nothing else is needed to be in it."""

import re
import sys
from pathlib import Path

import pytest

import dynarank.schedules
from dynarank._discovery import discover
from dynarank.cli.main import main
from dynarank.cli.methods import KINDS

NEW_SCHEDULE = '''"""A schedule that was dropped into the folder."""

from dynarank.schedules.base import AbstractSchedule


class Never(AbstractSchedule):
    """Holds no rank event at all.

    Reference:
        Nobody, "Nothing", 2030.
    """

    def moment(self, step):
        return "none"
'''


def test_everything_that_is_discovered_is_listed(capsys: pytest.CaptureFixture[str]):
    assert main(["methods"]) == 0
    shown = capsys.readouterr().out.splitlines()
    for title, package, base in KINDS:
        start = shown.index(title)
        end = shown.index("", start) if "" in shown[start:] else len(shown)
        names = [line.split()[0] for line in shown[start + 1 : end] if line.startswith("  ") and line[2] != " "]
        assert names == list(discover(package, base))


def test_each_comes_with_its_options_and_its_paper(capsys: pytest.CaptureFixture[str]):
    main(["methods"])
    shown = " ".join(capsys.readouterr().out.split())
    assert "options: tolerance=0.1, growth=1.0, min_rank=1 paper: Schotthöfer et al." in shown
    assert "options: fraction, start=None" in shown
    assert "https://arxiv.org/abs/2205.13571" in shown


def test_lines_fit(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("COLUMNS", "80")
    main(["methods"])
    assert all(len(line) <= 80 or "https://" in line for line in capsys.readouterr().out.splitlines())


def test_a_file_dropped_into_the_folder_is_listed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    (tmp_path / "never.py").write_text(NEW_SCHEDULE)
    monkeypatch.setattr(dynarank.schedules, "__path__", [*dynarank.schedules.__path__, str(tmp_path)])
    discover.cache_clear()
    try:
        main(["methods"])
    finally:
        discover.cache_clear()
        sys.modules.pop("dynarank.schedules.never", None)
    shown = capsys.readouterr().out
    assert re.search(r"^  never +Holds no rank event at all\.$", shown, re.MULTILINE)
    assert 'paper: Nobody, "Nothing", 2030.' in shown
