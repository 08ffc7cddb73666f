"""The page of a benchmark: one HTML file that needs nothing else, and one drawing for each case."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from dynarank._files import replacing
from dynarank.report.bench_drawing import Panel, draw_panel
from dynarank.report.comparison_drawing import GLYPHS, mark
from dynarank.report.markup import Markup, element, join, table
from dynarank.report.shell import page
from dynarank.report.svg import MID_TONES, PAGE, inline, theme

WORDS = ("series", "method")  # columns that hold no numbers
_COLUMNS = 3
_STYLE = """
main { max-width: 1240px; }
table { font-size: .84rem; }
"""
CAPTION = (
    "Time of a training step beside that of the dense network. The grey band is what two equal dense networks differ "
    "by; the dashed line is the ratio of FLOPs."
)


@dataclass(frozen=True)
class Section:
    """A case of the benchmark.

    Args:
        name: What it is called.
        text: What it is, in a sentence.
        tables: Tables as cells of text, each with its head first.
        notes: What there is to know about the numbers.
        panels: What is drawn.
    """

    name: str
    text: str
    tables: Sequence[Sequence[Sequence[str]]]
    notes: Sequence[str]
    panels: Sequence[Panel] = ()

    @property
    def markdown(self) -> list[str]:
        """The section in lines of Markdown."""
        lines = [f"## {self.name}", "", self.text, ""]
        for head, *body in self.tables:
            marks = ["---" if name in WORDS else "---:" for name in head]
            lines += [_line(head), _line(marks), *map(_line, body), ""]
        return [*lines, *(f"* {note}" for note in self.notes), ""]


def write_page(title: str, sections: Sequence[Section], notes: Sequence[str], path: Path) -> Path:
    """Write a benchmark as one self-contained HTML page and return its path.

    Raises:
        ImportError: If matplotlib is not installed.
    """
    top = element("header", element("h1", title), element("ul", *(element("li", note) for note in notes)))
    text = page(title, [top, *(_section(index, section) for index, section in enumerate(sections))], style=_STYLE)
    with replacing(path) as partial_file:
        partial_file.write_text(text, encoding="utf-8", errors="replace")
    return path


def write_drawing(section: Section, path: Path) -> Path:
    """Write the panels of a section side by side as one SVG, legible on white and on dark, and return its path.

    Raises:
        ImportError: If matplotlib is not installed.
    """
    with theme(MID_TONES):
        from matplotlib.figure import Figure

        columns = min(_COLUMNS, len(section.panels))
        rows = math.ceil(len(section.panels) / columns)
        figure = Figure(figsize=(max(5.4, 3.6 * columns), 2.9 * rows + 0.5), layout="constrained")
        places = list(figure.subplots(rows, columns, squeeze=False).flat)
        for axes, panel in zip(places, section.panels, strict=False):
            draw_panel(axes, panel, palette=MID_TONES)
            axes.set_title(panel.title, fontsize=9, loc="left")
        for axes in places[len(section.panels) :]:
            axes.set_axis_off()
        names = list(section.panels[0].methods)
        lines = places[0].containers[: len(names)]
        figure.legend(lines, names, loc="outside upper left", ncols=4, frameon=False, fontsize=9)
        figure.savefig(path, transparent=True, metadata={"Date": None})
    return path


def _section(number: int, section: Section) -> Markup:
    cards = [
        element(
            "figure",
            element("h3", panel.title),
            inline(partial(draw_panel, panel=panel, palette=PAGE), key=f"bench{number}-{index}", label=panel.title),
            class_="card",
        )
        for index, panel in enumerate(section.panels)
    ]
    names = list(section.panels[0].methods) if section.panels else []
    return element(
        "section",
        element("h2", section.name),
        element("p", section.text),
        element("p", CAPTION, class_="caption") if cards else None,
        element("ul", *(element("li", _named(index, name)) for index, name in enumerate(names)), class_="legend"),
        element("div", *cards, class_="grid"),
        *(table(head, body, numeric=_numbers(head)) for head, *body in section.tables),
        element("ul", *(element("li", note) for note in section.notes)),
    )


def _numbers(head: Sequence[str]) -> list[int]:
    return [index for index, name in enumerate(head) if name not in WORDS]


def _named(series: int, name: str) -> Markup:
    glyph = element("span", GLYPHS[mark(series)], style=f"color: var(--c{series % len(PAGE.series)})")
    return join([glyph, f" {name}"])


def _line(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cells)} |"
