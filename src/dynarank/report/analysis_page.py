"""The page of an analysis: one HTML file that needs nothing else."""

import os
from dataclasses import replace
from pathlib import Path

from dynarank._files import replacing
from dynarank.analysis.findings import Analysis
from dynarank.analysis.tables import Table, budget_table, layer_table, legend
from dynarank.report.analysis_cards import card_keys, layer_cards
from dynarank.report.formats import percent, short
from dynarank.report.markup import Markup, breakable, details, element, join, table
from dynarank.report.shell import page

_STYLE = """
main { max-width: 1240px; }
.wide table { font-size: .84rem; }
.wide th, .wide td { padding: .32rem .55rem; }
.wide thead th { font-size: .78rem; }
.wide small { display: block; color: var(--muted); font-weight: 400; max-width: 17rem; }
.wide tbody th { overflow-wrap: anywhere; min-width: 8rem; }
.keys { margin: 0 0 .4rem; }
.keys + .grid { margin-top: .7rem; }
.keys li:first-child { color: var(--muted); }
.card .note { color: var(--muted); font-size: .82rem; margin: 0 0 .5rem; }
.pair { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 170px), 1fr)); gap: .4rem 1rem; }
"""
_MAX_OPEN = 12


def write_analysis(analysis: Analysis, path: str | os.PathLike[str]) -> Path:
    """Write an analysis as one self-contained HTML page and return its path.

    The page shows what the model comes to at each budget, a table of all weights from the largest to the smallest, and
    for each weight its singular values, with the edge of the noise, and its error against its size. It opens offline,
    in light and dark.

    Args:
        analysis: What ``analyze`` found.
        path: File to write.

    Raises:
        ImportError: If matplotlib is not installed.

    Example:
        >>> import tempfile, torch
        >>> from dynarank.analysis import analyze
        >>> found = analyze({"fc.weight": torch.eye(30, 40)})
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     page = write_analysis(found, Path(folder) / "analysis.html")
        ...     "fc.<wbr>weight" in page.read_text(encoding="utf-8")
        True
    """
    target, text = Path(path), render_analysis(analysis)
    with replacing(target) as partial_file:
        # Names of layers need not be valid Unicode.
        partial_file.write_text(text, encoding="utf-8", errors="replace")
    return target


def render_analysis(analysis: Analysis) -> str:
    """Return the page of an analysis as text."""
    order = sorted(analysis.layers, key=lambda layer: -layer.parameters)
    analysis = replace(analysis, layers=tuple(order))
    sections = [_top(analysis), _budgets(analysis), _layers(analysis), _drawings(analysis)]
    return page(analysis.source, sections, style=_STYLE)


def _top(analysis: Analysis) -> Markup:
    replaceable = analysis.replaceable
    share = sum(layer.parameters for layer in replaceable) / max(1, analysis.parameters)
    facts = [
        ("Parameters", short(analysis.parameters), ""),
        ("Stored", short(analysis.bytes, unit="B"), ""),
        ("Replaceable", f"{len(replaceable)} of {len(analysis.layers)}", f"weights, {percent(share)} of the numbers"),
    ]
    if analysis.flops is not None:
        facts.append(("FLOPs", short(analysis.flops), "of one calibration batch"))
    if analysis.seconds is not None:
        facts.append(("Time", f"{short(1e3 * analysis.seconds)} ms", "of one calibration batch, measured"))
    tiles = [
        element(
            "div",
            element("dt", label),
            element("dd", value, class_="value"),
            element("dd", note, class_="note") if note else None,
            class_="tile",
        )
        for label, value, note in facts
    ]
    sub = element("p", "What the weights look like, and what they could become.", class_="sub")
    return join([element("header", element("h1", analysis.source), sub), element("dl", *tiles, class_="tiles")])


def _budgets(analysis: Analysis) -> Markup | None:
    if not analysis.outlooks:
        return None
    return _section(
        "What a budget comes to",
        "For each budget of parameters the choice that should do least damage to the outputs, before any training.",
        _table(budget_table(analysis)),
    )


def _layers(analysis: Analysis) -> Markup:
    return _section(
        "All weights",
        "The largest first. What can be gained from a weight shows in how few ranks hold most of it.",
        _table(layer_table(analysis), sorted_by="numbers"),
        details("What the columns mean", element("ul", *(element("li", line) for line in legend(analysis)))),
    )


def _table(found: Table, *, sorted_by: str = "") -> Markup:
    """Return a table with its last column, which holds remarks, below the names in the first one."""
    head = [f"{name} ▾" if name == sorted_by else name for name in found.head[:-1]]
    rows = []
    for first, *cells, remark in found.rows:
        small = element("small", remark) if remark else None
        rows.append([join([breakable(first), small]), *cells])
    return element("div", table(head, rows, numeric=found.right), class_="wide")


def _drawings(analysis: Analysis) -> Markup:
    cards = list(layer_cards(analysis))
    errors = "outputs on the calibration data" if analysis.calibrated else "weight"
    first, rest = cards[:_MAX_OPEN], cards[_MAX_OPEN:]
    return _section(
        "Singular values and errors",
        "Left: how strongly the weight uses each direction, on a scale whose marks are a fixed factor apart. The "
        "dashed grey curve is what random entries of the same level would give. Right: the relative squared error of "
        f"the {errors} when the weight keeps a part of its numbers; a dot for each budget above.",
        *(element("ul", *(element("li", part) for part in line), class_="legend keys") for line in card_keys(analysis)),
        element("div", *first, class_="grid"),
        details(f"Show {len(rest)} more weights", element("div", *rest, class_="grid")) if rest else None,
    )


def _section(heading: str, caption: str, *body: Markup | None) -> Markup:
    return element("section", element("h2", heading), element("p", caption, class_="caption"), *body)
