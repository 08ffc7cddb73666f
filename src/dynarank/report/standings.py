"""How contestants did, as data, and the table that Markdown, CSV and the page show."""

import csv
import io
import json
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from dynarank.report.formats import count, duration, percent, short

NONE = "–"
AGAIN = "dense again (A/A)"  # a second network like the one that times are relative to
_COLUMNS = [
    *("method", "size", "lr", "edge", "mean", "deviation", "runs", "diverged", "parameters", "trainable", "flops"),
    *("memory", "seconds", "step_median", "step_low", "step_high", "ranks", "failure"),
]
_FEW = 8  # ranks that a cell lists one by one


@dataclass(frozen=True)
class Ratio:
    """Time of a training step, relative to a dense one: median and quartiles."""

    median: float
    low: float
    high: float

    def __str__(self) -> str:
        return f"{self.median:.2f} ({self.low:.2f}–{self.high:.2f})"


@dataclass(frozen=True)
class Standing:
    """A contestant at one size.

    Args:
        method: Its name.
        size: The size that was asked for; empty for methods without sizes.
        lr: The learning rate that validation chose, or None.
        edge: ``"lowest"`` or ``"highest"`` where that is the end of the grid; else empty.
        tuning: Validation score by learning rate; None where the run diverged or failed.
        scores: Test score at the last step by seed.
        validation: Validation score at the last step by seed.
        diverged: Number of reported runs that diverged.
        failure: Why there is no score, or fewer than there should be; empty if nothing went wrong.
        parameters: Numbers stored as deployed, mean of the runs.
        trainable: Numbers that were trained at the last step, mean of the runs.
        seconds: Seconds of training, mean of the runs, beside whatever else ran.
        ranks: Ranks of the low-rank layers in the first run that ended well.
        flops: Operations of a forward pass of one sample, as deployed.
        memory: Most bytes alive at once in a training step.
        step: Time of a training step, relative to a dense one.
    """

    method: str
    size: str = ""
    lr: float | None = None
    edge: str = ""
    tuning: Mapping[float, float | None] = field(default_factory=dict)
    scores: Mapping[int, float] = field(default_factory=dict)
    validation: Mapping[int, float] = field(default_factory=dict)
    diverged: int = 0
    failure: str = ""
    parameters: float | None = None
    trainable: float | None = None
    seconds: float | None = None
    ranks: Mapping[str, int] = field(default_factory=dict)
    flops: float | None = None
    memory: int | None = None
    step: Ratio | None = None

    @property
    def name(self) -> str:
        """The method with its size."""
        return f"{self.method} at {self.size}" if self.size else self.method

    @property
    def mean(self) -> float | None:
        """Mean of the test scores."""
        return statistics.fmean(self.scores.values()) if self.scores else None

    @property
    def deviation(self) -> float | None:
        """Standard deviation of the test scores, of two or more."""
        return statistics.stdev(self.scores.values()) if len(self.scores) > 1 else None


@dataclass(frozen=True)
class Standings:
    """A whole comparison.

    Args:
        task: What was trained.
        measure: ``"accuracy"`` or ``"loss"``.
        dense_parameters: Numbers that the dense network stores.
        rows: The contestants, those without sizes first.
        seeds: Seeds that are reported.
        settings: Options of the comparison.
        command: Command line that repeats it.
        machine: What times depend on.
        again: Time of a second, identical dense network: what scatter alone does to such ratios.
        missing: Runs that have not been carried out yet.
    """

    task: str
    measure: str
    dense_parameters: int
    rows: Sequence[Standing]
    seeds: Sequence[int]
    settings: Mapping[str, Any] = field(default_factory=dict)
    command: str = ""
    machine: Mapping[str, Any] = field(default_factory=dict)
    again: Ratio | None = None
    missing: int = 0

    def as_dict(self) -> dict[str, Any]:
        """Return everything as plain data, with mean and deviation of every row."""
        found = asdict(self)
        for row, standing in zip(found["rows"], self.rows, strict=True):
            row |= {"mean": standing.mean, "deviation": standing.deviation}
        return found

    def score(self, value: float | None, *, digits: int = 2) -> str:
        """Return a score as text: accuracies in percent."""
        if value is None:
            return NONE
        return percent(value, digits=digits) if self.measure == "accuracy" else f"{value:.{digits + 2}f}"

    def head(self) -> tuple[str, ...]:
        """Return the names of the columns."""
        return (
            "method",
            "size",
            "lr",
            f"test {self.measure}",
            "runs",
            "parameters",
            "of dense",
            "trainable",
            "FLOPs",
            "memory",
            "training",
            "step / dense",
            "ranks",
        )

    def cells(self, row: Standing) -> tuple[str, ...]:
        """Return a row of the table as text."""
        quality = self.score(row.mean)
        if row.deviation is not None:
            spread = self.score(row.deviation)
            quality = f"{quality.removesuffix(' %')} ± {spread}"
        diverged = f", {row.diverged} diverged" if row.diverged else ""
        return (
            row.method,
            row.size or NONE,
            NONE if row.lr is None else f"{row.lr:g}{f' ({row.edge})' if row.edge else ''}",
            quality,
            f"{len(row.scores)} of {len(self.seeds)}{diverged}",
            _text(row.parameters, count),
            _text(row.parameters, lambda value: percent(value / self.dense_parameters)),
            _text(row.trainable, count),
            _text(row.flops, short),
            _text(row.memory, lambda value: short(value, unit="B")),
            _text(row.seconds, duration),
            NONE if row.step is None else str(row.step),
            ranks_text(list(row.ranks.values())),
        )

    def body(self) -> list[tuple[str, ...]]:
        """Return all rows of the table as text, the second dense network last."""
        rows = [self.cells(row) for row in self.rows]
        if self.again is None:
            return rows
        step = self.head().index("step / dense")
        return [*rows, (AGAIN, *(str(self.again) if column == step else NONE for column in range(1, len(self.head()))))]

    def notes(self) -> list[str]:
        """Return in sentences what the numbers mean and what went wrong."""
        tuned = max((len(row.tuning) for row in self.rows), default=0)
        seeds = " ".join(map(str, self.seeds))
        said = [
            f"Test {self.measure} at the last step, mean ± standard deviation over seeds {seeds}.",
            f"Each learning rate is the best of {tuned} on validation data, with a seed of its own."
            if tuned > 1
            else "No learning rate was tuned.",
            "Parameters are all numbers stored as deployed, biases and buffers included. FLOPs are those of a forward "
            "pass of one sample. Memory is the most that tensors hold at once in a training step. Training is the "
            "time of a run beside whatever else ran.",
        ]
        if self.again is not None:
            said.append(
                "The CPU time of a step is relative to the dense network with the task's recipe in the same round: "
                "median and quartiles of the rounds, "
                f"all methods in turn in one process. {AGAIN} is a second, identical dense network: its row is scatter."
            )
        if self.missing:
            said.append(f"{self.missing} runs are missing: the comparison has not ended.")
        edges = [row for row in self.rows if row.edge]
        if edges:
            said.append(
                "The best learning rate lies at the end of the grid, so that others may be better still: "
                f"{', '.join(f'{row.name} ({row.edge})' for row in edges)}."
            )
        return [*said, *(f"{row.name}: {row.failure}" for row in self.rows if row.failure)]

    def markdown(self) -> str:
        """Return the table and the notes as Markdown."""
        lines = [_line(self.head()), _line(["---"] * len(self.head())), *map(_line, self.body())]
        machine = ", ".join(f"{name} {value}" for name, value in self.machine.items())
        body = ["", *(f"* {note}" for note in self.notes()), "", f"`{self.command}`", "", machine, ""]
        return "\n".join([f"# {self.task}", "", *lines, *body])

    def csv(self) -> str:
        """Return the numbers, not rounded, one line for each row of the table."""
        text = io.StringIO()
        writer = csv.DictWriter(text, _COLUMNS, lineterminator="\n")
        writer.writeheader()
        for row in self.rows:
            step = _columns(row.step) if row.step is not None else {}
            own = {name: getattr(row, name) for name in _COLUMNS if hasattr(row, name)}
            ranks = json.dumps(dict(row.ranks)) if row.ranks else ""
            writer.writerow({**own, **step, "runs": len(row.scores), "ranks": ranks})
        if self.again is not None:
            writer.writerow({"method": AGAIN, **_columns(self.again)})
        return text.getvalue()


def ranks_text(ranks: Sequence[int]) -> str:
    """Return ranks one by one, or their range where they are many.

    Example:
        >>> ranks_text([5, 9, 7]), ranks_text(list(range(20))), ranks_text([4] * 20), ranks_text([])
        ('5 9 7', '0 to 19, median 9', '4 in all 20', '–')
    """
    if len(ranks) > _FEW and min(ranks) == max(ranks):
        return f"{ranks[0]} in all {len(ranks)}"
    if len(ranks) <= _FEW:
        return " ".join(map(str, ranks)) or NONE
    return f"{min(ranks)} to {max(ranks)}, median {statistics.median_low(ranks)}"


def _columns(step: Ratio) -> dict[str, float]:
    return {f"step_{name}": value for name, value in asdict(step).items()}


def _text(value: float | None, form: Any) -> str:
    return NONE if value is None else form(value)


def _line(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in cells)} |"
