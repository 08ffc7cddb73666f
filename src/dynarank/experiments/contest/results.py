"""From the rows of a comparison to its table and pages."""

import json
import logging
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from dynarank._files import replacing
from dynarank.experiments.contest.book import Book
from dynarank.experiments.contest.config import as_command
from dynarank.experiments.contest.costs import AGAIN
from dynarank.experiments.contest.entries import Entry
from dynarank.experiments.contest.rows import Row
from dynarank.experiments.contest.run import Run
from dynarank.experiments.plain import standard
from dynarank.experiments.proof import machine
from dynarank.report.comparison_page import write_comparison
from dynarank.report.standings import Ratio, Standing, Standings

PAGE = "index.html"

_logger = logging.getLogger(__name__)


def stand(entry: Entry, book: Book, costs: Mapping[str, Any] | None) -> Standing:
    """Return how an entry has done so far."""
    measure, lr, good = book.task.measure, book.chosen(entry), book.good(entry)
    trials = book.ended(book.trials(entry))
    finals = book.ended(book.finals(entry))
    own = (costs or {}).get(entry.label, {})
    return Standing(
        Path(entry.method).stem if entry.method.endswith(".py") else entry.method,
        entry.size.label if entry.size is not None else "",
        lr=lr,
        edge=_edge(lr, entry.lrs),
        tuning={run.lr: row["validation"][measure] if "validation" in row else None for run, row in trials},
        scores={run.seed: row["test"][measure] for run, row in good},
        validation={run.seed: row["validation"][measure] for run, row in good},
        diverged=sum("diverged" in row for _, row in finals),
        failure=_failure(entry, [row for _, row in trials], [row for _, row in finals]),
        parameters=_mean(good, "parameters"),
        trainable=_mean(good, "trainable"),
        seconds=_mean(good, "seconds"),
        ranks=good[0][1]["ranks"] if good else {},
        flops=own.get("flops"),
        memory=own.get("memory"),
        step=Ratio(**own["ratio"]) if own else None,
    )


def summarise(
    entries: Sequence[Entry], book: Book, costs: Mapping[str, Any] | None, *, dense_parameters: int, out: Path
) -> Standings:
    """Return the whole table of what there is."""
    config = book.config
    settings = {name: value for name, value in asdict(config).items() if name not in ("data_dir", "jobs")}
    progress = [book.progress(entry) for entry in entries]
    return Standings(
        Path(config.task).stem,
        book.task.measure,
        dense_parameters,
        [stand(entry, book, costs) for entry in entries],
        config.seeds,
        settings=standard(settings),
        command=as_command(config, str(out)),
        machine=machine() | {"threads": 1},
        again=Ratio(**costs[AGAIN]["ratio"]) if costs else None,
        missing=sum(runs - ended for ended, runs in progress),
    )


def write_pages(folder: Path, found: Standings) -> list[Path]:
    """Write table.md, table.csv, results.json and index.html, and return their paths; the last one needs matplotlib."""
    texts = {
        "table.md": found.markdown(),
        "table.csv": found.csv(),
        "results.json": json.dumps(standard(found.as_dict()), indent=1, allow_nan=False) + "\n",
    }
    for name, text in texts.items():
        with replacing(folder / name) as partial:
            partial.write_text(text, encoding="utf-8")
    paths = [folder / name for name in texts]
    try:
        return [*paths, write_comparison(found, folder / PAGE)]
    except ImportError as error:
        _logger.warning("No page was written: %s", error)
        return paths


def _edge(lr: float | None, lrs: Sequence[float]) -> str:
    if lr is None or len(lrs) == 1:
        return ""
    return {0: "lowest", len(lrs) - 1: "highest"}.get(lrs.index(lr), "")


def _failure(entry: Entry, trials: Sequence[Row], finals: Sequence[Row]) -> str:
    """Return what went wrong; a single learning rate that diverges is nothing of the kind."""
    if entry.waits:
        return "its size follows low-rank networks, and none of them has ended."
    failed = next((row["failed"] for row in (*trials, *finals) if "failed" in row), None)
    if failed is not None:
        return f"failed: {failed}"
    diverged = [row["diverged"] for row in finals if "diverged" in row]
    if diverged:
        return f"{len(diverged)} of {len(finals)} runs diverged: {diverged[0]}"
    diverged = [row["diverged"] for row in trials if "diverged" in row]
    every = trials and len(diverged) == len(entry.lrs)
    return f"diverged at every learning rate: {diverged[0]}" if every else ""


def _mean(good: Sequence[tuple[Run, Row]], name: str) -> float | None:
    return statistics.fmean(row[name] for _, row in good) if good else None
