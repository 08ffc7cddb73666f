"""The page of a comparison: one HTML file that needs nothing else."""

from functools import partial
from pathlib import Path

from dynarank._files import replacing
from dynarank.report.comparison_drawing import GLYPHS, Place, draw_pareto, mark
from dynarank.report.formats import count, percent
from dynarank.report.markup import Markup, details, element, join, table
from dynarank.report.shell import page
from dynarank.report.standings import NONE, Standing, Standings
from dynarank.report.svg import PAGE, inline
from dynarank.report.tables import facts

DENSE = "dense"  # the method that is a line in the drawings
_STYLE = """
main { max-width: 1240px; }
.wide table { font-size: .84rem; }
.wide th, .wide td { padding: .32rem .55rem; }
.wide thead th { font-size: .78rem; }
"""
_NUMERIC = range(2, 12)


def write_comparison(standings: Standings, path: Path) -> Path:
    """Write a comparison as one self-contained HTML page and return its path.

    Raises:
        ImportError: If matplotlib is not installed.

    Example:
        >>> import tempfile
        >>> rows = [Standing("dense", scores={0: 0.9}, parameters=100.0), Standing("small", scores={0: 0.8})]
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     path = write_comparison(Standings("digits", "accuracy", 100, rows, [0]), Path(folder) / "a.html")
        ...     "90.00 %" in path.read_text(encoding="utf-8")
        True
    """
    text = render_comparison(standings)
    with replacing(path) as partial_file:
        partial_file.write_text(text, encoding="utf-8", errors="replace")
    return path


def render_comparison(standings: Standings) -> str:
    """Return the page of a comparison as text."""
    sections = (_top(standings), _drawings(standings), _table(standings), _tuning(standings), _reproduce(standings))
    return page(standings.task, sections, style=_STYLE)


def _top(standings: Standings) -> Markup:
    runs = f"{len(standings.rows)} contestants, {len(standings.seeds)} seed{'s' * (len(standings.seeds) > 1)} each"
    warning = (
        element("p", f"{count(standings.missing)} runs are missing: the comparison has not ended.", class_="warn")
        if standings.missing
        else None
    )
    return element("header", element("h1", standings.task), element("p", f"{runs}.", class_="sub"), warning)


def _drawings(standings: Standings) -> Markup:
    names = list(dict.fromkeys(row.method for row in standings.rows if row.method != DENSE))
    stored = {id(row): row.parameters / standings.dense_parameters for row in standings.rows if row.parameters}
    times = {id(row): row.step.median for row in standings.rows if row.step is not None}
    cards = [_card(standings, names, stored, what="stored parameters")]
    if times:
        cards.append(_card(standings, names, times, what="time of a training step"))
    legend = element("ul", *(element("li", _named(index, name)) for index, name in enumerate(names)), class_="legend")
    return element(
        "section",
        element("h2", "Who is best at what cost"),
        element(
            "p",
            f"Mean test {standings.measure} at the last step; bars are one standard deviation over the seeds. The "
            "dashed line is the dense network with the task's own recipe. The broad grey line joins those that nobody "
            "beats at less cost.",
            class_="caption",
        ),
        legend,
        element("div", *cards, class_="grid"),
    )


def _card(standings: Standings, names: list[str], costs: dict[int, float], *, what: str) -> Markup:
    scored = [row for row in standings.rows if row.mean is not None and id(row) in costs]
    places = [_place(row, names.index(row.method), costs[id(row)]) for row in scored if row.method != DENSE]
    dense = next((_place(row, 0, 1.0) for row in standings.rows if row.method == DENSE and row.mean is not None), None)
    paint = partial(
        draw_pareto,
        places=places,
        dense=dense,
        higher_is_better=standings.measure == "accuracy",
        label=f"{what}, as a part of dense",
        palette=PAGE,
        unit="%" if standings.measure == "accuracy" else "",
    )
    better = "" if standings.measure == "accuracy" else ", lower is better"
    title = f"Test {standings.measure} against {what}{better}"
    drawing = inline(paint, key=what.split()[0], label=title, height=280)
    return element("figure", element("h3", title), drawing, class_="card")


def _place(row: Standing, series: int, cost: float) -> Place:
    return Place(series, cost, row.mean or 0.0, row.deviation or 0.0)


def _named(series: int, name: str) -> Markup:
    glyph = element("span", GLYPHS[mark(series)], style=f"color: var(--c{series % len(PAGE.series)})")
    return join([glyph, f" {name}"])


def _table(standings: Standings) -> Markup:
    return element(
        "section",
        element("h2", "All numbers"),
        element("div", table(standings.head(), standings.body(), numeric=_NUMERIC), class_="wide"),
        element("ul", *(element("li", note) for note in standings.notes())),
    )


def _tuning(standings: Standings) -> Markup | None:
    """Return what validation said of each learning rate, the best first in its row."""
    tuned = [row for row in standings.rows if len(row.tuning) > 1]
    if not tuned:
        return None
    width = max(len(row.tuning) for row in tuned)
    body = []
    for row in tuned:
        cells = [f"{lr:g}: {standings.score(score)}" for lr, score in sorted(row.tuning.items())]
        body.append([row.name, *cells, *[NONE] * (width - len(cells))])
    heads = ["Contestant", *(f"{index + 1}." for index in range(width))]
    return element(
        "section",
        element("h2", "How learning rates were chosen"),
        element("p", f"Validation {standings.measure} of each, lowest first; {NONE}: diverged.", class_="caption"),
        details("Show all", table(heads, body, numeric=range(1, width + 1))),
    )


def _reproduce(standings: Standings) -> Markup:
    sizes = {row.name: percent(row.parameters / standings.dense_parameters) for row in standings.rows if row.parameters}
    recorded = {"settings": dict(standings.settings), "machine": dict(standings.machine), "stored": sizes}
    return element(
        "section",
        element("h2", "How to reproduce"),
        element("pre", element("code", standings.command)) if standings.command else None,
        facts({name: value for name, value in recorded.items() if value}, folded=True),
    )
