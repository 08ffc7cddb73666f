"""What a compression has come to, beside the network as given: data, and the table that shows it."""

import platform
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from typing import Any

import torch
from torch import nn

from dynarank.compress.recovery import Recovery
from dynarank.compress.report import CompressionReport
from dynarank.compress.tolerance import Trial
from dynarank.experiments.costs import Costs
from dynarank.experiments.plain import standard
from dynarank.measure import Timing
from dynarank.report.formats import percent, short

GIVEN, TRUNCATED, RECOVERED, STUDENT = "as given", "after truncation", "after recovery", "narrower dense"
COMPRESSED = "compressed"
NONE = "-"


@dataclass(frozen=True)
class Row:
    """One network.

    Args:
        name: What it is.
        scores: Its scores on test data by name, the one that counts first; empty where it cannot be evaluated.
        costs: What it costs. Networks of the same shapes share one measurement.
        predicted: Seconds of a forward pass of a calibration batch that its layers' times add up to, or None.
    """

    name: str
    scores: Mapping[str, float]
    costs: Costs
    predicted: float | None = None


@dataclass(frozen=True)
class Proof:
    """A compressed network beside others.

    Args:
        subject: Name of the network.
        measure: Name of the score that counts.
        higher_is_better: Whether it should be high.
        rows: The networks, the one as given first.
        model: The compressed network, as trained last.
        settings: Options of the compression.
        report: What became of every layer.
        recovery: How recovery went, or None.
        trials: Sizes that were tried where a tolerance was given.
        predicted_at: Batch size that the predicted seconds are for, or None.
        notes: What was left out, and why.
    """

    subject: str
    measure: str
    higher_is_better: bool
    rows: tuple[Row, ...]
    model: nn.Module = field(repr=False)
    settings: Mapping[str, Any] = field(default_factory=dict)
    report: CompressionReport | None = None
    recovery: Recovery | None = None
    trials: tuple[Trial, ...] = ()
    predicted_at: int | None = None
    notes: tuple[str, ...] = ()

    def as_dict(self) -> dict[str, Any]:
        """Return everything but the network as plain data that standard JSON holds: null for what is not finite."""
        found = {field.name: getattr(self, field.name) for field in fields(self) if field.name != "model"}
        return standard({**found, "machine": machine()})

    def table(self) -> list[tuple[str, ...]]:
        """Return the table as cells of text, its head first; columns of which nothing is known are left out."""
        first = self.rows[0].costs
        sizes = sorted(first.latency)
        head = ["network", *self.rows[0].scores, "parameters", "of given", "bytes"]
        if sizes:
            head += [f"FLOPs at {sizes[0]}", *(f"time at {size}" for size in sizes), f"memory at {sizes[-1]}"]
        if self.predicted_at is not None:
            head.append(f"predicted at {self.predicted_at}")
        return [tuple(head), *(tuple(self._cells(row, first.parameters)) for row in self.rows)]

    def verdict(self) -> list[str]:
        """Return in sentences how fast the compressed network is, and what was left out."""
        before = self.rows[0].costs.latency
        after = next(row for row in reversed(self.rows) if row.name != STUDENT).costs.latency
        return [*(_speed(size, before[size], after[size]) for size in sorted(before)), *self.notes]

    def markdown(self) -> str:
        """Return the table, the verdict and the machine as Markdown."""
        head, *body = self.table()
        lines = [_line(head), _line(("---", *("---:" for _ in head[1:]))), *map(_line, body)]
        where = machine()
        threads = f"{where['threads']} thread{'' if where['threads'] == 1 else 's'}"
        notes = [*self.verdict(), f"Measured with {threads} on {where['processor']} and torch {where['torch']}."]
        return "\n".join([f"# {self.subject}", "", *lines, "", *(f"* {note}" for note in notes), ""])

    def _cells(self, row: Row, whole: int) -> list[str]:
        costs = row.costs
        cells = [row.name, *(score_text(name, row.scores.get(name)) for name in self.rows[0].scores)]
        cells += [f"{costs.parameters:,}", percent(costs.parameters / whole), short(costs.bytes, unit="B")]
        if costs.latency:
            cells += [short(costs.flops or 0), *(time_text(costs.latency[size]) for size in sorted(costs.latency))]
            cells.append(short(costs.memory or 0, unit="B"))
        if self.predicted_at is not None:
            cells.append(NONE if row.predicted is None else seconds_text(row.predicted))
        return cells


def machine() -> dict[str, Any]:
    """Return what times depend on."""
    return {"processor": platform.machine(), "threads": torch.get_num_threads(), "torch": str(torch.__version__)}


def score_text(name: str, value: float | None) -> str:
    """Return a score: an accuracy in percent.

    Example:
        >>> score_text("accuracy", 0.9871), score_text("loss", 0.25), score_text("loss", None)
        ('98.71 %', '0.25', '-')
    """
    if value is None:
        return NONE
    return percent(value, digits=2) if "accuracy" in name and abs(value) <= 1 else f"{value:.5g}"


def seconds_text(seconds: float) -> str:
    """Return seconds in the unit that suits them.

    Example:
        >>> seconds_text(0.00123), seconds_text(2.5), seconds_text(4.2e-5)
        ('1.23 ms', '2.5 s', '42 µs')
    """
    for size, unit in ((1.0, "s"), (1e-3, "ms")):
        if seconds >= size:
            return f"{seconds / size:.3g} {unit}"
    return f"{seconds / 1e-6:.3g} µs"


def time_text(timing: Timing) -> str:
    """Return a time as its median with half of the distance between its quartiles.

    Example:
        >>> time_text(Timing(median=1.2e-3, low=1.1e-3, high=1.5e-3, rounds=9))
        '1.2 ms ± 17 %'
    """
    return f"{seconds_text(timing.median)} ± {50 * (timing.high - timing.low) / timing.median:.0f} %"


def _speed(size: int, before: Timing, after: Timing) -> str:
    if before.low <= after.high and after.low <= before.high:
        return f"Batch size {size}: no difference in time that stands out of its scatter."
    ratio = before.median / after.median
    said = f"{ratio:.2f} times as fast as given" if ratio >= 1 else f"takes {1 / ratio:.2f} times as long as given"
    return f"Batch size {size}: {said}."


def _line(cells: tuple[str, ...]) -> str:
    return f"| {' | '.join(cells)} |"
