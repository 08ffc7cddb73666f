"""A benchmark: every series that is missing, one row each, then the pages."""

import json
import os
import platform
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, final

import torch

from dynarank._discovery import discover
from dynarank.experiments.bench.cases.base import AbstractCase, Series
from dynarank.experiments.bench.config import PACKAGE, BenchConfig, find_case, find_integrator
from dynarank.experiments.bench.measuring import measure_series
from dynarank.experiments.contest.rows import ROWS, Rows
from dynarank.experiments.proof import machine
from dynarank.integrators.base import AbstractIntegrator

CPUS = Path("/proc/cpuinfo")


@final
@dataclass(frozen=True)
class News:
    """What a benchmark is doing.

    Args:
        case: Name of the case.
        series: Name of the series.
        done: Series that are done.
        number: Series in all.
        row: What was found, where the series has ended.
    """

    case: str
    series: str
    done: int
    number: int
    row: Mapping[str, Any] | None = None


Tell = Callable[[News], None]
Field = tuple[Mapping[str, AbstractCase], Mapping[str, AbstractIntegrator]]  # by name


def measure_all(config: BenchConfig, field: Field, out: Path, *, tell: Tell) -> dict[str, list[dict[str, Any]]]:
    """Measure every series that the folder does not hold yet, and return the rows of each case.

    Rows that were measured with other settings stay in the folder and are not looked at.

    Args:
        config: Settings.
        field: What `line_up` returns for them.
        out: Folder of the benchmark.
        tell: Called with what is being done.

    Raises:
        ValueError: The folder holds something else. Nothing was measured.
        KeyboardInterrupt: At Ctrl-C; the series that have ended are kept.
    """
    cases, integrators = field
    if out.exists() and (not out.is_dir() or (any(out.iterdir()) and not (out / ROWS).exists())):
        raise ValueError(f"out must be a new or an empty folder or one of a benchmark, got {out}.")
    rows, wanted = Rows(out), [(name, series) for name, case in cases.items() for series in case.series()]
    out.mkdir(parents=True, exist_ok=True)
    with pinned(config.threads):
        for done, (name, series) in enumerate(wanted):
            key = _key(config, name, series)
            if rows.get(key) is None:
                tell(News(name, series.name, done, len(wanted)))
                rows.add(key, measure_row(config, name, series, integrators))
                tell(News(name, series.name, done + 1, len(wanted), rows.get(key)))
    found = {name: [rows.get(_key(config, name, series)) for series in case.series()] for name, case in cases.items()}
    return {name: [row for row in of if row is not None] for name, of in found.items()}


def line_up(config: BenchConfig) -> Field:
    """Return the cases and the integrators of a configuration by name.

    Raises:
        ValueError: A name is unknown, or a file does not define what it should.
        RuntimeError: A file of the user fails.
    """
    cases = {name: find_case(name) for name in config.cases or discover(PACKAGE, AbstractCase)}
    return cases, {word: find_integrator(word) for word in config.words}


def measure_row(
    config: BenchConfig, case: str, series: Series, integrators: Mapping[str, AbstractIntegrator]
) -> dict[str, Any]:
    """Return what a series costs, with the machine and how busy it was before and after."""
    before = _load()
    device = torch.device(config.device)
    found = measure_series(series, integrators, device=device, seconds=config.seconds)
    return {
        "case": case,
        "series": series.name,
        **found,
        "machine": describe_machine(config),
        "load": [before, _load()],
    }


def describe_machine(config: BenchConfig) -> dict[str, Any]:
    """Return what times depend on."""
    gpu = {"gpu": torch.cuda.get_device_name()} if config.device == "cuda" else {}
    return machine() | {"processor": _processor(), "threads": config.threads, "device": config.device} | gpu


@contextmanager
def pinned(threads: int) -> Iterator[None]:
    """Compute with so many threads until the block ends."""
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _key(config: BenchConfig, case: str, series: Series) -> str:
    """Return what a row is measured with: another of these makes another row."""
    ranks: Sequence[Any] = [dict(ranks) for ranks in series.ranks]
    settings = {name: getattr(config, name) for name in ("words", "device", "threads", "seconds")}
    return json.dumps({"case": case, "series": series.name, "ranks": ranks, **settings})


def _processor() -> str:
    """Return the name of the CPU, as far as the system tells it."""
    lines = CPUS.read_text(encoding="utf-8").splitlines() if CPUS.exists() else []
    names = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(names, platform.processor() or platform.machine())


def _load() -> float | None:
    """Return how many processes wanted to compute in the last minute, on average."""
    return round(os.getloadavg()[0], 2) if hasattr(os, "getloadavg") else None
