"""A comparison of methods on a task: every run that is missing, then what the networks cost, then the pages."""

import json
from collections.abc import Callable, Sequence
from contextlib import closing
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, final

import torch

from dynarank.experiments.contest.book import Book
from dynarank.experiments.contest.config import SHARED, ContestConfig
from dynarank.experiments.contest.costs import measure_costs
from dynarank.experiments.contest.entries import Entry, enter, settle
from dynarank.experiments.contest.jobs import Outcome, one_by_one, one_thread, side_by_side
from dynarank.experiments.contest.methods import find_method, find_task
from dynarank.experiments.contest.results import summarise, write_pages
from dynarank.experiments.contest.rows import Rows, claim_folder
from dynarank.experiments.contest.run import Run
from dynarank.experiments.proof import machine
from dynarank.factorize import deployed_parameters
from dynarank.report.standings import Standings


@dataclass(frozen=True)
class News:
    """What a comparison is doing.

    Args:
        label: Of what.
        done: Runs that have ended.
        runs: Runs in all.
        step: Steps taken in this run, where it trains in this process.
        steps: Steps of this run; 0 for what is no training.
        loss: Mean loss of the last steps.
        outcome: How the run ended, where it has.
    """

    label: str
    done: int
    runs: int
    step: int = 0
    steps: int = 0
    loss: float = 0.0
    outcome: Outcome | None = None


Tell = Callable[[News], None]


def quiet(news: News) -> None:
    """Tell nobody."""


def compare_methods(config: ContestConfig, out: Path, *, tell: Tell = quiet) -> tuple[Standings, list[Path]]:
    """Compare methods on a task, or go on with a comparison that was interrupted.

    Every run that ends is kept in the folder at once; runs that are there are not repeated, except for those whose
    code failed. The table and the pages are made of these rows alone.

    Args:
        config: What to compare.
        out: Folder of the comparison.
        tell: Called with what is being done.

    Returns:
        The table, and the files that were written.

    Raises:
        ValueError: Something cannot be as it is asked for, or the folder is one of other settings. Nothing was trained.
        RuntimeError: A file of the user fails. Nothing was trained.
        KeyboardInterrupt: At Ctrl-C; the pages show what there is by then.
    """
    task = find_task(config.task, config.data_dir)
    with one_thread():
        entries = enter(config, task)
        shared = {name: getattr(config, name) for name in SHARED}
        claim_folder(out, shared | {"steps": config.steps or task.training_steps})
        contest = _Contest(entries, Book(config, task, Rows(out)), out, tell)
        try:
            contest.hold()
            contest.measure()
        finally:
            found = contest.standings()
            written = write_pages(out, found)
    return found, written


@final
class _Contest:
    def __init__(self, entries: list[Entry], book: Book, out: Path, tell: Tell) -> None:
        self.entries, self.book, self.out, self.tell = entries, book, out, tell
        with torch.random.fork_rng(devices=range(torch.cuda.device_count())):
            self.dense_parameters = deployed_parameters(book.task.model())

    def hold(self) -> None:
        """Carry out what is missing: first for entries whose size is known, then for those that follow them."""
        self._train()
        if any(entry.waits for entry in self.entries):
            self.entries = [self._settled(entry) for entry in self.entries]
            self._train()

    def _train(self) -> None:
        for part in (self.book.trials, self.book.finals):
            self._carry_out([run for entry in self.entries for run in part(entry) if not self._has(run)])

    def _carry_out(self, runs: Sequence[Run]) -> None:
        config = self.book.config
        if config.jobs == 1:
            performed = one_by_one(runs, self.book.task, lambda run, *where: self._say(run.label, *where))
        else:
            performed = side_by_side(runs, config.jobs, data_dir=config.data_dir)
        with closing(performed):
            for run, outcome in performed:
                self.book.rows.add(run.key, {**asdict(run), **outcome, "machine": machine()})
                self._say(run.label, outcome=outcome)

    def _has(self, run: Run) -> bool:
        row = self.book.rows.get(run.key)
        return row is not None and "failed" not in row

    def _settled(self, entry: Entry) -> Entry:
        """Return an entry that follows the largest low-rank network of its size; it waits on if there is none."""
        rivals = [other for other in self.entries if other.size == entry.size and not find_method(other.method).follows]
        stored = [row["parameters"] for other in rivals for _, row in self.book.good(other)]
        return settle(entry, max(stored)) if entry.waits and stored else entry

    def measure(self) -> None:
        """Measure what the networks cost at their final ranks, unless that has been done for these very networks."""
        key, runs = self._measured()
        if runs and self.book.rows.get(key) is None:
            self._say("measuring the time of a step")
            costs = measure_costs(self.book.task, runs, seconds=self.book.config.seconds)
            self.book.rows.add(key, {"costs": costs, "machine": machine()})

    def _measured(self) -> tuple[str, dict[str, tuple[Run, dict[str, int]]]]:
        """Return by entry the first reported run that ended well with its ranks, and the key of their costs."""
        good = {entry.label: self.book.good(entry) for entry in self.entries}
        runs = {label: (found[0][0], found[0][1]["ranks"]) for label, found in good.items() if found}
        of = {label: [run.key, ranks] for label, (run, ranks) in runs.items()}
        return json.dumps({"costs": of, "seconds": self.book.config.seconds}, sort_keys=True), runs

    def _say(self, label: str, *where: Any, outcome: Outcome | None = None) -> None:
        progress = [self.book.progress(entry) for entry in self.entries]
        done, runs = (sum(numbers) for numbers in zip(*progress, strict=True))
        self.tell(News(label, done, runs, *where, outcome=outcome))

    def standings(self) -> Standings:
        """Return the table of what there is."""
        row = self.book.rows.get(self._measured()[0])
        costs = row["costs"] if row is not None else None
        return summarise(self.entries, self.book, costs, dense_parameters=self.dense_parameters, out=self.out)
