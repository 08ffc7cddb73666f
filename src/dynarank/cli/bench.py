"""The command ``bench``: its progress, its tables, and whether anything became slower."""

import json
import shutil
import sys
import textwrap
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dynarank._discovery import describe, discover
from dynarank.cli.options import Spec
from dynarank.cli.outcome import aligned
from dynarank.experiments.bench.bench import News, line_up, measure_all
from dynarank.experiments.bench.cases.base import AbstractCase
from dynarank.experiments.bench.config import METHODS, PACKAGE, BenchConfig, as_command
from dynarank.experiments.bench.quick import COMMITTED, check_quickly, save_quickly
from dynarank.experiments.bench.results import SHOWN, STEP_HEAD, summarise, write_pages
from dynarank.experiments.plain import standard
from dynarank.experiments.run_folder import next_free
from dynarank.integrators.base import AbstractIntegrator
from dynarank.report.bench_page import Section

OK, SLOWER = 0, 1


@dataclass(frozen=True)
class Bench:
    """Measure what a training step, inference and memory cost, beside dense networks and plain training of factors.

    All contenders of a series take their steps in turn in one process, by the time of its threads, and every ratio is
    taken within a round; equal networks are measured twice, and what differs by less than they do is marked. Series
    that end are kept at once, and the same command goes on after an interruption.

    Args:
        list: List the cases and methods that there are, and stop.
        quick: Measure a small subset in about a minute and compare it with the committed figures: the exit code is 1 if
            one is worse by more than 15 % beyond the noise.
        save: With quick: write the figures instead of comparing with them.
        out: Folder of the benchmark. Default: runs/bench-<number>.
        json: Print the rows as one JSON object in the last line of the output.
    """

    settings: dict[str, Any]
    list: bool = False
    quick: bool = False
    save: bool = False
    out: str | None = None
    json: bool = False


SPEC = Spec(
    Bench,
    config=BenchConfig,
    positional=("cases",),
    metavars={"cases": "CASE ...", "methods": "METHOD ...", "out": "FOLDER", "device": "cpu|cuda"},
    hints={"cases": "(default: all)", "methods": f"(default: {','.join(METHODS)})"},
)


def run_bench(command: Bench) -> int:
    """Measure what is missing and print the tables, or do what else was asked for; return the exit code.

    Raises:
        ValueError: Options do not go together, or a value is none that is allowed. Nothing was measured.
    """
    if command.list:
        return _list()
    config = BenchConfig(**command.settings)
    if command.save and not command.quick:
        raise ValueError("--save writes the figures of --quick. Give both, or name a folder with --out.")
    if command.quick and (command.out or command.json):
        raise ValueError("--quick keeps nothing. Leave --out and --json away.")
    return _quickly(config, save=command.save) if command.quick else _thoroughly(config, command)


def _thoroughly(config: BenchConfig, command: Bench) -> int:
    field = line_up(config)
    out, fresh = (Path(command.out), False) if command.out else (next_free("bench").path, True)
    try:
        rows = measure_all(config, field, out, tell=_tell)
    except KeyboardInterrupt:
        print(f"\n{out} keeps the series that have ended. Go on with: {as_command(config, str(out))}", file=sys.stderr)
        raise
    finally:
        if fresh:
            with suppress(OSError):  # not empty: that is what it is for
                out.rmdir()
    found = [row for of in rows.values() for row in of]
    sections = summarise(field[0], rows)
    written = write_pages(out, sections, found, as_command(config, str(out)))
    for section in sections:
        _show(section)
    print(*(f"{path.suffix[1:]:<6}{path}" for path in written), sep="\n")
    if command.json:
        print(json.dumps(standard({"rows": found, "out": str(out)}), allow_nan=False))
    return OK


def _quickly(config: BenchConfig, *, save: bool) -> int:
    if save:
        ratios = save_quickly(config, tell=_tell)
        print(*(f"{name}: {ratio:.3f}" for name, ratio in ratios.items()), f"written to {COMMITTED}", sep="\n")
        return OK
    checks = check_quickly(config, tell=_tell)
    print(*checks, sep="\n")
    worse = [check for check in checks if check.is_worse]
    if worse:
        print(f"dynarank: {len(worse)} of {len(checks)} ratios are worse than committed: {worse[0]}", file=sys.stderr)
    return SLOWER if worse else OK


# --- what is shown -----------------------------------------------------------------------------------------------


def _tell(news: News) -> None:
    print(line(news), file=sys.stderr, flush=True)


def line(news: News) -> str:
    """Return in a line what a benchmark is doing.

    Example:
        >>> line(News("tiny", "batch 32", 0, 3))
        'tiny, batch 32: measuring'
        >>> line(News("tiny", "batch 32", 1, 3, {"rounds": 8}))
        '1 of 3: tiny, batch 32: 8 rounds'
    """
    label = f"{news.case}, {news.series}"
    if news.row is None:
        return f"{label}: measuring"
    return f"{news.done} of {news.number}: {label}: {news.row['rounds']} rounds"


def _show(section: Section) -> None:
    """Print the columns that fit beside each other, then the notes."""
    steps, *others = section.tables
    columns = [STEP_HEAD.index(name) for name in SHOWN]
    tables = [[tuple(row[index] for index in columns) for row in steps], *others]
    print(f"{section.name}: {section.text}", "", sep="\n")
    for table in tables:
        print(*aligned([tuple(row) for row in table]), "", sep="\n")
    print(*map(_wrapped, section.notes), "", sep="\n")


def _list() -> int:
    kinds = (("Cases", PACKAGE, AbstractCase), ("Methods", "dynarank.integrators", AbstractIntegrator))
    for title, package, base in kinds:
        found = {name: describe(cls)[0] for name, cls in discover(package, base).items()}
        print(title, *_described(found), "", sep="\n")
    print("A Python file with one class derived from AbstractCase is a case of your own, one with a class derived from")
    print("AbstractIntegrator is a method. Options go behind a name: augmented_bug:coefficient_steps=4.")
    return OK


def _described(found: dict[str, str]) -> Sequence[str]:
    column = max(map(len, found)) + 4
    return [f"  {name}".ljust(column) + text for name, text in sorted(found.items())]


def _wrapped(text: str) -> str:
    return textwrap.fill(text, width=min(120, shutil.get_terminal_size((120, 0)).columns), break_long_words=False)
