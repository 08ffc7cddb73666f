"""From the rows of a benchmark to its tables, drawings and pages."""

import logging
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from dynarank._discovery import describe
from dynarank._files import replacing
from dynarank.experiments.bench.cases.base import AbstractCase
from dynarank.experiments.bench.config import AGAIN, DENSE, PLAIN, PLAIN_AGAIN
from dynarank.experiments.bench.ratios import Spread
from dynarank.experiments.proof import NONE, seconds_text
from dynarank.report.bench_drawing import Dot, Panel
from dynarank.report.bench_page import Section, write_drawing, write_page
from dynarank.report.formats import percent, short

SAME = "="  # behind a ratio that says nothing
STEP_HEAD = (
    *("series", "rank", "method", "steps", "a step", "beside dense", "95 % interval", "quartiles", "mean"),
    *("beside plain", "FLOPs", "reached", "upkeep", "memory", "weights", "gradients", "state"),
)
SHOWN = ("series", "rank", "method", "a step", "beside dense", "beside plain", "FLOPs", "reached", "upkeep", "memory")
INFERENCE_HEAD = ("series", "rank", "method", "batch", "a pass", "beside dense", "95 % interval")
NOTES = (
    "A step is zero_grad, forward, loss, backward and update, at ranks that stay. Its time is that of all threads of "
    "the process (on a GPU: between two events), the median over rounds; in a round each contender takes its steps in "
    "turn. Ratios are taken within a round.",
    f"'{DENSE}' is SGD with Nesterov momentum. '{PLAIN}' is the same SGD on both factors of the same low-rank layers. "
    f"'{AGAIN}' and '{PLAIN_AGAIN}' are second, equal networks (A/A): what differs by less than they do is marked "
    f"{SAME} and is no difference.",
    "steps: consecutive steps of a measurement; * less than a cycle of 25, so periodic upkeep may fall out of the "
    "median, but not out of the mean. FLOPs: of forward and backward pass, beside dense. reached: the speed-up as a "
    "part of that by FLOPs. upkeep: the part of a step that the update takes beyond that of plain factors, on average.",
    "memory: most bytes that tensors hold at once in a step, of which weights, gradients and optimizer state stay.",
)
CARD, DRAWINGS, PAGE = "table.md", "svg", "index.html"

_logger = logging.getLogger(__name__)

Row = Mapping[str, Any]


def summarise(cases: Mapping[str, AbstractCase], rows: Mapping[str, Sequence[Row]]) -> list[Section]:
    """Return what was found of each case."""
    return [_section(Path(name).stem, cases[name], found) for name, found in rows.items() if found]


def write_pages(folder: Path, sections: Sequence[Section], rows: Iterable[Row], command: str) -> list[Path]:
    """Write the tables, and where matplotlib is there the drawings and the page; return their paths."""
    notes = [*NOTES, *_machines(rows)]
    lines = ["# Benchmark", "", f"`{command}`", "", *(line for section in sections for line in section.markdown)]
    with replacing(folder / CARD) as partial:
        partial.write_text("\n".join([*lines, *(f"* {note}" for note in notes), ""]), encoding="utf-8")
    written = [folder / CARD]
    try:
        written += [write_drawing(section, folder / f"{section.name}.{DRAWINGS}") for section in sections]
        return [*written, write_page("Benchmark", sections, [command, *notes], folder / PAGE)]
    except ImportError as error:
        _logger.warning("No drawings were made: %s", error)
        return written


def _section(name: str, case: AbstractCase, rows: Sequence[Row]) -> Section:
    steps = [cells for row in rows for cells in _steps(row, case)]
    inference = [cells for row in rows for cells in _inference(row)]
    tables = [[STEP_HEAD, *steps], *([[INFERENCE_HEAD, *inference]] if inference else [])]
    notes = [*_layers(rows), *_failures(rows)]
    notes += dict.fromkeys(f"{quoted.method} is quoted: {quoted.source}." for quoted in case.quoted)
    return Section(name, describe(type(case))[0], tables, notes, [_panel(row) for row in rows])


# --- cells -----------------------------------------------------------------------------------------------------------


def _steps(row: Row, case: AbstractCase) -> list[tuple[str, ...]]:
    """Return the cells of all contenders of a series; what others published comes after those of its rank."""
    entries = [entry for entry in row["entries"] if "failed" not in entry]
    noise = margins(row)
    cells = [(entry["rank"], _step(row["series"], entry, noise)) for entry in entries]
    for quoted in case.quoted:
        if quoted.series == row["series"] and (at := [i for i, (rank, _) in enumerate(cells) if rank == quoted.rank]):
            told = {"series": quoted.series, "rank": quoted.rank, "method": f"{quoted.method} (quoted)"}
            told["beside dense"] = f"{quoted.to_dense:g}"
            cells.insert(at[-1] + 1, (quoted.rank, tuple(told.get(name, NONE) for name in STEP_HEAD)))
    return [line for _, line in cells]


def _step(series: str, entry: Row, noise: Mapping[str, float]) -> tuple[str, ...]:
    to_dense, memory = Spread(**entry["to_dense"]), entry["memory"]
    reached = entry["operations"] / to_dense.median if "operations" in entry else None
    known = {
        "series": series,
        "rank": entry["rank"] or NONE,
        "method": entry["method"],
        "steps": f"{entry['steps']}{'' if entry['whole_cycles'] else '*'}",
        "a step": seconds_text(entry["seconds"]["clock"]),
        "beside dense": ratio_text(to_dense, noise[""]) if entry["method"] != DENSE else "1",
        "95 % interval": f"{to_dense.first:.3f}-{to_dense.last:.3f}",
        "quartiles": f"{to_dense.low:.3f}-{to_dense.high:.3f}",
        "mean": f"{to_dense.mean:.3f}",
        "memory": short(memory["peak"], unit="B"),
        "weights": short(memory["parameters"], unit="B"),
        "gradients": short(memory["gradients"], unit="B"),
        "state": short(memory["state"], unit="B"),
    }
    if entry["rank"]:
        to_plain = Spread(**entry["to_plain"])
        known["beside plain"] = ratio_text(to_plain, noise[entry["rank"]]) if entry["method"] != PLAIN else "1"
        known["FLOPs"], known["reached"] = f"{entry['operations']:.3f}", percent(reached or 0, digits=0)
        known["upkeep"] = percent(entry["upkeep"]) if "upkeep" in entry and entry["method"] != PLAIN else NONE
    return tuple(known.get(name, NONE) for name in STEP_HEAD)


def ratio_text(ratio: Spread, margin: float) -> str:
    """Return a ratio, marked where it says nothing.

    Example:
        >>> ratio_text(Spread(0.5, 0.4, 0.6, 0.4, 0.6, 0.5), 1.02), ratio_text(Spread(1.01, 1, 1.1, 1, 1.1, 1), 1.02)
        ('0.500', '1.010 =')
    """
    return f"{ratio.median:.3f}" if ratio.stands_out(margin) else f"{ratio.median:.3f} {SAME}"


def margins(row: Row) -> dict[str, float]:
    """Return within which factor equal networks differed in a series: dense ones, and plain ones at each rank."""
    again = {AGAIN: "to_dense", PLAIN_AGAIN: "to_plain"}
    entries = [entry for entry in row["entries"] if entry["method"] in again and "failed" not in entry]
    return {entry["rank"]: Spread(**entry[again[entry["method"]]]).margin for entry in entries}


def _inference(row: Row) -> list[tuple[str, ...]]:
    noise = {
        found["batch"]: Spread(**found["to_dense"]).margin for found in row["inference"] if found["method"] == AGAIN
    }
    cells = []
    for found in row["inference"]:
        to_dense = Spread(**found["to_dense"])
        cells.append(
            (
                row["series"],
                found["rank"] or NONE,
                "two plain layers" if found["rank"] else found["method"],
                str(found["batch"]),
                seconds_text(found["seconds"]),
                ratio_text(to_dense, noise[found["batch"]]) if found["method"] != DENSE else "1",
                f"{to_dense.first:.3f}-{to_dense.last:.3f}",
            )
        )
    return cells


# --- notes and drawings ----------------------------------------------------------------------------------------------


def _layers(rows: Sequence[Row]) -> list[str]:
    """Return in sentences which layers were really factorised."""
    names = dict.fromkeys(", ".join(entry["ranks"]) for row in rows for entry in row["entries"] if entry.get("ranks"))
    return [f"Factorised: {text}. Everything else is dense." for text in names]


def _failures(rows: Sequence[Row]) -> list[str]:
    return [
        f"{entry['method']} at rank {entry['rank']} of {row['series']} was left out: {entry['failed']}"
        for row in rows
        for entry in row["entries"]
        if "failed" in entry
    ]


def _machines(rows: Iterable[Row]) -> list[str]:
    """Return where the rows were measured, and how busy it was there."""
    loads: dict[str, list[float]] = {}
    for row in rows:
        where = ", ".join(f"{name} {value}" for name, value in row["machine"].items())
        loads.setdefault(where, []).extend(load for load in row["load"] if load is not None)
    return [
        f"Measured on {where}; load average {min(load):g} to {max(load):g}." if load else f"Measured on {where}."
        for where, load in loads.items()
    ]


def _panel(row: Row) -> Panel:
    entries = [entry for entry in row["entries"] if entry["rank"] and "failed" not in entry]
    methods: dict[str, list[Dot]] = {}
    for entry in entries:
        if entry["method"] != PLAIN_AGAIN:
            found = Spread(**entry["to_dense"])
            dot = Dot(entry["rank_part"], found.median, found.first, found.last)
            methods.setdefault(entry["method"], []).append(dot)
    arithmetic = [(entry["rank_part"], entry["operations"]) for entry in entries if entry["method"] == PLAIN]
    return Panel(row["series"], methods, arithmetic, margins(row)[""])
