"""The command ``analyze``: what the weights of a network look like and what they could become."""

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

from dynarank.analysis import Analysis, analyze
from dynarank.analysis.analyzer import Tell, silent
from dynarank.analysis.tables import Table, budget_table, layer_table, legend
from dynarank.cli.arguments import Analyze
from dynarank.experiments.locate import load_module, load_weights_
from dynarank.experiments.tasks import TASKS
from dynarank.experiments.user_file import read_subject
from dynarank.report.analysis_page import write_analysis


def run_analysis(command: Analyze) -> None:
    """Analyse what the command names, print the tables and write the files.

    Raises:
        ValueError: Options do not go together, or `analyze` refuses.
        RuntimeError: Code of the user fails.
    """
    subject, options = _subject(command)
    with _telling() as tell:
        found = analyze(
            subject,
            budgets=command.budgets,
            target_modules=command.include or None,
            exclude_modules=command.exclude or None,
            tell=tell,
            **options,
        )
    _show(found)
    if command.json is not None:
        print(f"json    {found.save_json(command.json)}")
    if command.html is not None:
        print(f"page    {write_analysis(found, command.html)}")


def _subject(command: Analyze) -> tuple[Any, dict[str, Any]]:
    """Return what is to be analysed, with the options that it allows."""
    name, timed = command.model, {"timed": command.timed}
    if name in TASKS:
        task = TASKS[name](command.data_dir)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            model = task.model()
        if command.weights is None:
            print(f"{name} has fresh weights here; give trained ones with --weights.", file=sys.stderr)
        else:
            load_weights_(model, command.weights)
        return model, timed | {"calibration": task.calibration_batches()}
    _refuse(command, "data_dir", "belongs to the built-in tasks " + ", ".join(TASKS))
    if name.endswith(".py"):
        _refuse(command, "weights", "does not go with a file that loads its own")
        subject = read_subject(name)
        return subject.model(), timed | {"calibration": subject.calibration(), "forward": subject.forward}
    _refuse(command, "timed", "needs calibration data, which built-in tasks and files with calibration_batches() have")
    if _is_function(name):
        model = load_module(name)
        if command.weights is not None:
            load_weights_(model, command.weights)
        return model, {}
    _refuse(command, "weights", "needs a model to load them into")
    return name, {}


def _is_function(name: str) -> bool:
    """Whether a word names a function in a file or a module, rather than a file of weights."""
    place, _, function = name.rpartition(":")
    return function.isidentifier() and (place.endswith(".py") or all(map(str.isidentifier, place.split("."))))


def _refuse(command: Analyze, option: str, why: str) -> None:
    if getattr(command, option) is not None:
        raise ValueError(f"--{option.replace('_', '-')} {why}; got it with {command.model}.")


# --- what is shown -----------------------------------------------------------------------------------------------


@contextmanager
def _telling() -> Iterator[Tell]:
    """Show on a terminal which weight is looked at, until the block ends."""
    console = _terminal(stderr=True)
    if console is None:
        yield silent
        return
    from rich.markup import escape

    with console.status("looking at the layers") as status:
        yield lambda done, total, name: status.update(escape(f"weight {done + 1} of {total}: {name}"))


def _show(found: Analysis) -> None:
    """Print the tables: drawn on a terminal, aligned text elsewhere."""
    console = _terminal()
    if console is None:
        print(found)
        return
    console.print(_drawn(layer_table(found)), *legend(found), _drawn(budget_table(found)), sep="\n", markup=False)


def _drawn(table: Table) -> Any:
    from rich.table import Table as Drawn
    from rich.text import Text

    drawn = Drawn(box=None, pad_edge=False, header_style="dim")
    for index, head in enumerate(table.head):
        drawn.add_column(Text(head), justify="right" if index in table.right else "left", overflow="fold")
    for row in table.rows:
        drawn.add_row(*map(Text, row))
    return drawn


def _terminal(*, stderr: bool = False) -> Any:
    """Return rich's console where there is a terminal and rich, else None."""
    try:
        from rich.console import Console
    except ImportError:
        return None
    console = Console(stderr=stderr, highlight=False)
    return console if console.is_terminal else None
