"""The outcome of a run as text."""

import shutil
import textwrap
from collections.abc import Sequence
from typing import Any


def print_outcome(outcome: dict[str, Any]) -> None:
    """Print the table of networks, the ranks, what the comparison says, and where everything is."""
    for text in lines(outcome):
        print(text)


def lines(outcome: dict[str, Any]) -> list[str]:
    """Return the outcome in lines of text."""
    rows = outcome["comparison"] or [_own_row(outcome)]
    dense = [f"{name}: {reason}" for name, reason in outcome["kept_dense"].items()]
    facts = [
        ("ranks", ", ".join(_rank(outcome, name) for name in outcome["ranks"]) + _planted(outcome)),
        ("dense", "; ".join(dense)),
        ("run", outcome["out"]),
        ("report", outcome["report"]),
    ]
    said = [*outcome["verdict"], ""] if outcome["verdict"] else []
    return ["", *_table(rows), "", *map(_wrapped, said), *(f"{name:<8}{text}" for name, text in facts if text)]


def _rank(outcome: dict[str, Any], name: str) -> str:
    first, last, full = (outcome[key][name] for key in ("first_ranks", "ranks", "full_ranks"))
    return f"{name} {first} → {last} of {full}"


def _wrapped(text: str) -> str:
    return textwrap.fill(text, width=min(120, shutil.get_terminal_size((120, 0)).columns))


def _own_row(outcome: dict[str, Any]) -> dict[str, Any]:
    return {
        "name": "low rank",
        "test_accuracy": outcome["test_accuracy"],
        "test_loss": outcome["test_loss"],
        "parameters": outcome["parameters"],
        "percent_of_dense": 100 * outcome["parameters"] / outcome["dense_parameters"],
        "seconds": outcome["seconds"],
        "ms_per_step": 1000 * outcome["seconds"] / outcome["steps"],
    }


def _table(rows: list[dict[str, Any]]) -> list[str]:
    measure = "test loss" if rows[0].get("test_accuracy") is None else "test accuracy"
    head = ("network", measure, "parameters", "of dense", "training", "per step")
    return aligned([head, *map(_cells, rows)])


def aligned(cells: Sequence[tuple[str, ...]]) -> list[str]:
    """Return a table in lines of text, its first column to the left and the others to the right.

    Example:
        >>> aligned([("network", "size"), ("a", "1,024")])
        ['network   size', 'a        1,024']
    """
    widths = [max(len(row[column]) for row in cells) for column in range(len(cells[0]))]
    return ["  ".join(_padded(row, widths)).rstrip() for row in cells]


def _cells(row: dict[str, Any]) -> tuple[str, ...]:
    accuracy = row.get("test_accuracy")
    return (
        row["name"],
        f"{row['test_loss']:.5g}" if accuracy is None else f"{100 * accuracy:.2f} %",
        f"{row['parameters']:,}",
        f"{row['percent_of_dense']:.2f} %",
        f"{row['seconds']:.1f} s",
        f"{row['ms_per_step']:.2f} ms",
    )


def _padded(cells: tuple[str, ...], widths: list[int]) -> list[str]:
    return [cells[0].ljust(widths[0]), *(cell.rjust(width) for cell, width in zip(cells[1:], widths[1:], strict=True))]


def _planted(outcome: dict[str, Any]) -> str:
    planted = outcome["planted_rank"]
    return "" if planted is None else f"  (planted: {planted})"
