"""What the rows say of an entry: the learning rate that was chosen, what has ended, what is missing."""

from dataclasses import dataclass
from typing import final

from dynarank.experiments.contest.config import ContestConfig
from dynarank.experiments.contest.entries import Entry
from dynarank.experiments.contest.rows import Row, Rows
from dynarank.experiments.contest.run import Run
from dynarank.experiments.tasks.base import AbstractTask


@final
@dataclass(frozen=True)
class Book:
    """Rows, read by entries. An entry that waits for its size has no runs yet.

    Args:
        config: Settings of the comparison.
        task: The task.
        rows: What has been found.
    """

    config: ContestConfig
    task: AbstractTask
    rows: Rows

    def trials(self, entry: Entry) -> list[Run]:
        """Return the runs that choose the learning rate; none where there is one alone."""
        rates = entry.lrs if len(entry.lrs) > 1 and not entry.waits else ()
        steps = self.config.tune_steps or self._steps
        return [self._run(entry, rate, self.config.tune_seed, steps, final=False) for rate in rates]

    def chosen(self, entry: Entry) -> float | None:
        """Return the learning rate with the best validation score; None while a run is missing, or if all went wrong.

        Among equal accuracies the smaller loss wins.
        """
        if entry.waits or len(entry.lrs) == 1:
            return None if entry.waits else entry.lrs[0]
        rows = {run.lr: self.rows.get(run.key) for run in self.trials(entry)}
        found = {lr: row["validation"] for lr, row in rows.items() if row is not None and "validation" in row}
        if not found or None in rows.values():
            return None
        if self.task.measure == "loss":
            return min(found, key=lambda lr: found[lr]["loss"])
        return max(found, key=lambda lr: (found[lr][self.task.measure], -found[lr]["loss"]))

    def finals(self, entry: Entry) -> list[Run]:
        """Return the runs that are reported; none until a learning rate is chosen."""
        lr = self.chosen(entry)
        seeds = self.config.seeds if lr is not None else ()
        return [self._run(entry, lr or 0.0, seed, self._steps, final=True) for seed in seeds]

    def ended(self, runs: list[Run]) -> list[tuple[Run, Row]]:
        """Return those of the runs that have ended, well or not, with their rows."""
        return [(run, row) for run in runs if (row := self.rows.get(run.key)) is not None]

    def good(self, entry: Entry) -> list[tuple[Run, Row]]:
        """Return the reported runs that ended well."""
        return [(run, row) for run, row in self.ended(self.finals(entry)) if "test" in row]

    def progress(self, entry: Entry) -> tuple[int, int]:
        """Return how many runs of an entry have ended, and how many there are to be."""
        trials, finals = self.trials(entry), self.finals(entry)
        ended = len(self.ended(trials))
        tuning = len(entry.lrs) if len(entry.lrs) > 1 else 0
        if tuning and ended == tuning and not finals:
            return ended, tuning  # all went wrong, and nothing can be reported
        return ended + len(self.ended(finals)), tuning + len(self.config.seeds)

    @property
    def _steps(self) -> int:
        return self.config.steps or self.task.training_steps

    def _run(self, entry: Entry, lr: float, seed: int, steps: int, *, final: bool) -> Run:
        return Run(self.config.task, entry.method, entry.size, entry.parameters, lr, seed, steps, final)
