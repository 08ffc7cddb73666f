"""The command ``analyze``: what the weights of a network look like, what they could become, and how they settled."""

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from dynarank.analysis import Analysis, analyze
from dynarank.analysis.analyzer import BUDGETS, Tell, silent
from dynarank.analysis.tables import Table, budget_table, layer_table, legend
from dynarank.cli.arguments import Analyze
from dynarank.cli.outcome import aligned
from dynarank.experiments.locate import load_module, load_weights_
from dynarank.experiments.tasks import TASKS
from dynarank.experiments.user_file import read_subject
from dynarank.history import HISTORY_FILE, History
from dynarank.report import stability_table
from dynarank.report.analysis_page import write_analysis


def run_analysis(command: Analyze) -> None:
    """Analyse what the command names, print the tables and write the files; of a run, tell its last look.

    Raises:
        ValueError: Options do not go together, `analyze` refuses, or a run holds no look or is broken.
        RuntimeError: Code of the user fails.
    """
    if (file := _history_in(command.model)) is not None:
        _tell_run(command, file)
        return
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
    if getattr(command, option) not in (None, (), BUDGETS):
        raise ValueError(f"--{option.replace('_', '-')} {why}; got it with {command.model}.")


# --- a run -----------------------------------------------------------------------------------------------------------


def _history_in(name: str) -> Path | None:
    """Return the record of a run, or None where the word names something else; a built-in task goes first."""
    path = Path(name)
    file = path / HISTORY_FILE if path.is_dir() else path
    ending = Path(HISTORY_FILE).suffix
    return file if name not in TASKS and file.suffix == ending and file.is_file() else None


def _tell_run(command: Analyze, file: Path) -> None:
    """Print the last look at the weights of a run."""
    for option in ("weights", "budgets", "include", "exclude", "timed", "data_dir", "json"):
        _refuse(command, option, "belongs to weights and models, not to a run, whose record is told as it is")
    _refuse(command, "html", "belongs to weights and models; `dynarank report` makes the page of a run")
    history = History.read(file)
    if not history.looks:
        raise ValueError(
            f"{file} holds no look at the weights. A training loop records them with "
            "dynarank.stability.WeightWatch(model, history); to see weights as they are, give a file of them."
        )
    found = stability_table.look_table(history)
    texts = stability_table.look_title(history), *stability_table.LEGEND
    console = _terminal()
    if console is None:
        print(*aligned([found.head, *found.rows]), "", *texts, sep="\n")
    else:
        console.print(_drawn(found), "", *texts, sep="\n", markup=False)


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
