"""The looks at the weights on the page of a run, and as a table."""

import math
import re
from html.parser import HTMLParser

import pytest
import torch
from torch import nn

from dynarank.history import History
from dynarank.report import sections
from dynarank.report.page import render
from dynarank.report.stability_plots import MAX_LAYERS, legend, measure_plots, measured, stability_plot
from dynarank.report.stability_table import look_table, look_title
from dynarank.stability import WeightWatch

HEADING = "Do the weights settle?"
HOSTILE = "<script>alert(1)</script>\"'><img src=x onerror=alert(2)>$x_1$&lt;_"


class Page(HTMLParser):
    """The tags, texts and labels of a page; fails on unbalanced elements."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[str] = []
        self.ids: list[str] = []
        self.labels: list[str] = []
        self.text = ""
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag, attrs):
        self.handle_startendtag(tag, attrs)
        if tag not in ("meta", "wbr"):
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.tags.append(tag)
        assert not [name for name, _ in attrs if name.startswith("on")]
        self.ids += [value for name, value in attrs if name == "id"]
        self.labels += [value for name, value in attrs if name == "aria-label"]

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.text += data


def watched(layers: int = 2, *, looks: int = 4, lr: float | None = 0.1) -> History:
    """Return the history of a model whose weights move less and less."""
    torch.manual_seed(0)
    history = History()
    model = nn.Sequential(*(nn.Linear(8, 12 if index % 2 else 8, bias=False) for index in range(layers)))
    watch = WeightWatch(model, history)
    for look in range(looks):
        watch.look(25 * look, lr=lr)
        with torch.no_grad():
            for p in model.parameters():
                p.add_(torch.randn_like(p), alpha=0.1**look)
    return history


def drawings(page: str) -> list[str]:
    return re.findall(r"<svg.*?</svg>", page, flags=re.DOTALL)


def test_a_run_without_looks_has_no_such_section():
    history = History()
    history.describe(ranks={"fc1": 3})
    history.log(step=1, loss=0.5)
    before = render(history, name="a run")
    assert HEADING not in before and "Singular values at the last look" not in before
    history.records += [{"kind": "weather", "step": 1}]
    assert render(history, name="a run") == before


def test_the_section_shows_the_map_all_measures_and_every_spectrum():
    page = Page(render(watched(), name="a run"))
    assert HEADING in page.text
    assert "Stability S of each layer over time, its mean, and the learning rate" in page.labels
    for measure in ("Overlap of leading directions", "Change, ‖ΔW‖ / ‖W‖", "Stable rank", "Effective rank"):
        assert f"{measure} over time" in page.labels
    assert [label for label in page.labels if "last look" in label] == [
        "Singular values of 0 at the last look",
        "Singular values of 1 at the last look",
    ]
    assert len(page.ids) == len(set(page.ids))


def test_drawings_follow_the_colours_of_the_page():
    found = drawings(sections.stability(watched(8)) or "")
    assert len(found) == 1 + 6 + 8
    for drawing in found:
        assert "var(--c0)" in drawing
        assert not re.findall(r"(?:fill|stroke): ?#[0-9a-f]{6}", drawing)


def test_a_layer_has_the_colour_of_the_legend_also_where_others_have_no_value():
    history = History()
    for step in (0, 10):
        history.look(step=step, layers={"fc1": {"stable_rank": 3.0 + step}, "fc2": {"stable_rank": 2.0, "change": 0.5}})
    stable, change = (plot.svg for plot in sorted(measure_plots(history), key=lambda plot: plot.title, reverse=True))
    assert legend(history) == ("fc1", "fc2")
    assert "stroke: var(--c0)" in stable and "stroke: var(--c1)" in stable
    assert "stroke: var(--c0)" not in change and "stroke: var(--c1)" in change


def test_a_cell_is_the_fuller_the_less_a_layer_turned():
    plot = stability_plot(watched(1, looks=5))
    assert plot is not None
    found = re.findall(r'clip-path="[^"]*" style="fill: var\(--c0\)(?:; fill-opacity: ([\d.]+))?"', plot.svg)
    cells = [float(opacity or 1) for opacity in found]
    assert len(cells) == 4 and sorted(cells) == cells
    assert cells[0] < 0.5 < cells[-1]


def test_without_a_learning_rate_there_is_no_drawing_of_it():
    with_rate, without = (stability_plot(watched(lr=lr)) for lr in (0.1, None))
    assert with_rate is not None and without is not None
    assert ">lr<" in with_rate.svg and ">lr<" not in without.svg


def test_a_single_look_shows_what_it_can():
    page = Page(sections.stability(watched(looks=1)) or "")
    assert HEADING in page.text and "Stable rank over time" in page.labels
    assert not [label for label in page.labels if label.startswith(("Stability S", "Overlap", "Change"))]


def test_of_many_layers_some_have_a_row_and_names_stay_within_it():
    plot = stability_plot(watched(MAX_LAYERS + 30, looks=2))
    assert plot is not None
    rows = re.findall(r">(\d+)</text>", plot.svg)
    assert {"0", str(MAX_LAYERS + 29)} <= set(rows)
    history = History()
    for step in (0, 1):
        history.look(step=step, layers={f"model.{'deep.' * 20}fc": {"stability": 0.5}})
    plot = stability_plot(history)
    assert plot is not None and "…" in plot.svg and "deep.deep.deep.deep.deep.deep.deep" not in plot.svg


def test_names_stay_text():
    history = watched()
    for record in history.records:
        record["layers"] = {HOSTILE: record["layers"]["0"]}
    page = Page(render(history, name="a run"))
    assert not {"script", "img", "iframe", "object", "link"} & set(page.tags)
    assert f"Singular values of {HOSTILE} at the last look" in page.labels


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf, None, "text", [1], {"a": 1}, True, -3, 0])
def test_measures_of_any_kind_do_not_hinder_the_section(value: object):
    history = watched(1, looks=2)
    odd = dict.fromkeys(history.looks[0]["layers"]["0"], value)
    history.look(step=99, layers={"0": odd, "other": odd}, lr=None)
    assert Page(sections.stability(history) or "").labels
    assert look_table(history)


def test_looks_that_tell_nothing_give_no_section():
    history = History()
    history.look(step=0, layers={})
    history.look(step=1, layers={"0": {"stability": "text"}})
    assert sections.stability(history) is None


def test_equal_runs_give_equal_pages():
    assert sections.stability(watched(1)) == sections.stability(watched(1))


# --- the table ---------------------------------------------------------------------------------------------------


def test_the_table_tells_the_last_look_and_how_it_moved():
    history = watched(looks=4)
    found = look_table(history)
    first, second, last = (history.looks[index]["layers"]["1"] for index in (0, 1, 3))
    row, below = found.rows[2:4]
    cells, moved = dict(zip(found.head, row, strict=True)), dict(zip(found.head, below, strict=True))
    assert cells["layer"] == "1" and cells["shape"] == "12 x 8" and cells["pays to"] == "4"
    assert cells["S"] == f"{last['stability']:.4f}"
    assert moved["S"] == f"{last['stability'] - second['stability']:+.4f}"  # the first look has none
    assert cells["stable"] == f"{last['stable_rank']:.1f}"
    assert moved["stable"] == f"{last['stable_rank'] - first['stable_rank']:+.1f}"
    assert moved["rank"] == moved["pays to"] == ""
    assert cells["overlap"].endswith(" %")
    assert look_title(history).startswith("Look 4, at step 75 (learning rate 0.1), compared with step 50;")


def test_what_a_look_lacks_is_left_open():
    history = History()
    history.look(step=3, layers={"fc": {"rank": 5}})
    ((name, shape, *cells), below) = look_table(history).rows
    assert (name, shape, cells) == ("fc", "–", ["–"] * 7 + ["5", "–"])
    assert set(below) == {""}
    assert look_title(history) == "Look 1, at step 3; below each value how it moved over the run."


def test_without_a_look_there_is_no_table():
    with pytest.raises(ValueError, match="holds no look at the weights"):
        look_table(History())


def test_steps_without_a_measure_are_left_out():
    history = watched(1, looks=3)
    assert [step for step, _ in measured(history, "stability")["0"]] == [25, 50]
    assert [step for step, _ in measured(history, "rank")["0"]] == [0, 25, 50]
    assert measured(history, "nothing") == {}
