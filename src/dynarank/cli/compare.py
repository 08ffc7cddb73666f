"""The command ``compare``: its progress, its table, and where the pages are."""

import json
import shutil
import sys
import textwrap
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from dynarank.cli.arguments import Compare
from dynarank.cli.display import logging_to
from dynarank.cli.outcome import aligned
from dynarank.errors import missing_extra
from dynarank.experiments.contest.config import ContestConfig, as_command
from dynarank.experiments.contest.contest import News, Tell, compare_methods
from dynarank.experiments.contest.methods import available, tasks
from dynarank.experiments.plain import standard
from dynarank.experiments.proof import score_text
from dynarank.experiments.run_folder import next_free
from dynarank.report.standings import Standings

SHOWN = ("method", "size", "lr", "runs", "of dense", "FLOPs", "memory", "training", "step / dense")


def run_comparison(command: Compare) -> None:
    """Compare methods, or go on with an earlier comparison, and print the table; or list what there is."""
    if command.list:
        _list()
        return
    config = ContestConfig(**command.settings)
    out, fresh = (Path(command.out), False) if command.out else (next_free(f"compare-{_name(config)}").path, True)
    try:
        with _telling() as tell:
            found, written = compare_methods(config, out, tell=tell)
    except KeyboardInterrupt:
        print(f"\n{out} keeps the runs that have ended. Go on with: {as_command(config, str(out))}", file=sys.stderr)
        raise
    finally:
        if fresh:
            with suppress(OSError):  # not empty: that is what it is for
                out.rmdir()
    _show(found)
    print("", *(f"{path.suffix[1:]:<6}{path}" for path in written), sep="\n")
    if command.json:
        print(json.dumps(standard(found.as_dict()) | {"out": str(out)}, allow_nan=False))


def _name(config: ContestConfig) -> str:
    return Path(config.task).stem


def _list() -> None:
    for title, found in (("Tasks", tasks()), ("Methods", available())):
        column = max(map(len, found)) + 4
        print(title, *(_described(name, text, column) for name, text in sorted(found.items())), "", sep="\n")
    print("A Python file with one class derived from AbstractTask is a task of your own; one with a class derived from")
    print("AbstractContestant or AbstractIntegrator is a method. Options go behind a name: tangent_muon:momentum=0.95.")


def _described(name: str, text: str, column: int) -> str:
    """Return a name and what it stands for, from ``column`` on, in lines that fit."""
    width = max(min(120, shutil.get_terminal_size((120, 0)).columns), column + 40)
    return textwrap.fill(text, width=width, initial_indent=f"  {name}".ljust(column), subsequent_indent=" " * column)


# --- what is shown -----------------------------------------------------------------------------------------------


@contextmanager
def _telling() -> Iterator[Tell]:
    """Show on standard error which run is on and how each ended, until the block ends.

    Raises:
        ImportError: If rich is not installed.
    """
    try:
        from rich.console import Console
        from rich.markup import escape
    except ImportError as error:
        raise missing_extra("rich", "cli") from error
    console = Console(stderr=True, highlight=False)
    with logging_to(console):
        if not console.is_terminal:
            yield lambda news: console.print(line(news), markup=False, soft_wrap=True) if not news.step else None
            return
        with console.status("looking at methods and data") as status:

            def tell(news: News) -> None:
                if news.outcome is not None:
                    console.print(line(news), markup=False, soft_wrap=True)
                status.update(escape(f"run {min(news.done + 1, news.runs)} of {news.runs}: {line(news)}"))

            yield tell


def line(news: News) -> str:
    """Return in a line what a comparison is doing.

    Example:
        >>> line(News("dense, lr 1, seed 0", 3, 8, 50, 200, 0.25))
        'dense, lr 1, seed 0: step 50 of 200, loss 0.25'
        >>> line(News("dense, lr 1, seed 0", 4, 8, outcome={"test": {"accuracy": 0.9, "loss": 0.3}}))
        '4 of 8: dense, lr 1, seed 0: test accuracy 90.00 %, loss 0.3'
    """
    if news.outcome is None:
        return f"{news.label}: step {news.step} of {news.steps}, loss {news.loss:.4g}" if news.steps else news.label
    return f"{news.done} of {news.runs}: {news.label}: {_ending(news.outcome)}"


def _ending(outcome: Mapping[str, Any]) -> str:
    for how in ("failed", "diverged"):
        if how in outcome:
            return f"{how}: {outcome[how]}"
    part = "test" if "test" in outcome else "validation"
    scores = {name: value for name, value in outcome[part].items() if value is not None}
    return f"{part} {', '.join(f'{name} {score_text(name, value)}' for name, value in scores.items())}"


def _show(found: Standings) -> None:
    """Print the columns that fit beside each other, then the notes."""
    head = found.head()
    quality = next(index for index, name in enumerate(head) if name.startswith("test "))
    columns = [index for index, name in enumerate(head) if name in SHOWN or index == quality]
    cells = [tuple(row[index] for index in columns) for row in (head, *found.body())]
    width = min(120, shutil.get_terminal_size((120, 0)).columns)
    notes = (textwrap.fill(note, width=width, break_long_words=False) for note in found.notes())
    print("\n".join([*aligned(cells), "", *notes]))
