"""The page of an analysis: everything is on it, nothing from outside, and names stay text."""

import re
import sys
from html.parser import HTMLParser

import pytest
import torch
from torch import nn

from dynarank.analysis import Analysis, analyze
from dynarank.report.analysis_page import render_analysis, write_analysis

HOSTILE = "<script>alert(1)</script>\"'><img src=x onerror=alert(2)>$x_1$&lt;_"
VOID = ("meta", "wbr")


class Page(HTMLParser):
    """What a browser would see; fails on unbalanced elements."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[str] = []
        self.attributes: list[tuple[str, str]] = []
        self.text = ""
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.attributes += [(name, value or "") for name, value in attrs]
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.tags.append(tag)
        self.attributes += [(name, value or "") for name, value in attrs]

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.text += data

    def values(self, name: str) -> list[str]:
        return [value for key, value in self.attributes if key == name]


def network() -> nn.Sequential:
    return nn.Sequential(nn.Conv2d(3, 9, 3), nn.ReLU(), nn.Flatten(), nn.Linear(9 * 16, 21), nn.Embedding(5, 8))


@pytest.fixture(scope="module")
def calibrated() -> Analysis:
    torch.manual_seed(0)
    return analyze(network()[:4], calibration=[torch.randn(16, 3, 6, 6)], timed=0.001, budgets=(0.5, 0.25, 0.001))


@pytest.fixture(scope="module")
def plain() -> Analysis:
    torch.manual_seed(0)
    return analyze(network())


@pytest.fixture(scope="module")
def hostile() -> Analysis:
    torch.manual_seed(0)
    return analyze({HOSTILE: torch.randn(30, 20), f"{HOSTILE}2": torch.randn(30, 20)})


@pytest.mark.parametrize("fixture", ["calibrated", "plain", "hostile"])
def test_the_page_refers_to_nothing_outside_itself(fixture, request):
    text = render_analysis(request.getfixturevalue(fixture))
    page = Page(text)
    references = [value for name in ("href", "src", "xlink:href", "action") for value in page.values(name)]
    assert all(value.startswith("#") for value in references)
    assert "://" not in text and "@import" not in text
    ids = page.values("id")
    targets = re.findall(r"url\(#([^)]*)\)", text) + [value[1:] for value in page.values("href")]
    assert len(ids) == len(set(ids))
    assert targets and set(targets) <= set(ids)
    assert "default-src 'none'; style-src 'unsafe-inline'" in page.values("content")[0]


def test_every_weight_has_a_row_and_its_drawings(plain):
    page = Page(render_analysis(plain))
    for layer in plain.layers:
        assert f"Singular values of {layer.name} by rank" in page.values("aria-label")
        assert (f"Error of {layer.name} by size" in page.values("aria-label")) == bool(layer.curves)
        assert layer.reason in page.text
    rows = re.findall(r"<tbody>.*?</tbody>", render_analysis(plain), flags=re.DOTALL)[1]
    assert re.findall(r'<th scope="row">(\d)', rows) == ["3", "0", "4"]  # the largest first


def test_the_budgets_are_told_also_where_they_cannot_be_met(calibrated):
    text = Page(render_analysis(calibrated)).text
    assert "speed-up" in text and "damage" in text and "sensitivity" in text
    assert "cannot be met: with every layer at its smallest" in text
    assert "outputs on the calibration data" in text


def test_without_calibration_nothing_is_said_of_it(plain):
    text = Page(render_analysis(plain)).text
    for word in ("calibration", "speed-up", "sensitivity", "FLOPs"):
        assert word not in text


def test_names_stay_text(hostile):
    page = Page(render_analysis(hostile))
    assert not {"script", "img", "iframe", "object", "link"} & set(page.tags)
    assert not [name for name, _ in page.attributes if name.startswith("on")]
    assert f"Singular values of {HOSTILE} by rank" in page.values("aria-label")
    assert HOSTILE in page.text


def test_drawings_follow_the_colours_of_the_page(calibrated):
    drawings = re.findall(r"<svg.*?</svg>", render_analysis(calibrated), flags=re.DOTALL)
    assert len(drawings) == 4
    for drawing in drawings:
        assert "var(--c0)" in drawing
        assert not re.findall(r"(?:fill|stroke): ?#[0-9a-f]{6}", drawing)


def test_many_weights_are_folded():
    found = analyze({f"layers.{index}.weight": torch.randn(5, 9) for index in range(15)}, budgets=())
    page = Page(render_analysis(found))
    assert page.tags.count("svg") == 30
    assert "Show 3 more weights" in page.text
    assert "What a budget comes to" not in page.text


def test_odd_weights_do_not_hinder_the_page():
    tensors = {
        "zero": torch.zeros(6, 9),
        "one": torch.ones(6, 9),
        "row": torch.ones(1, 9),
        "int": torch.ones(2, 2).int(),
    }
    page = Page(render_analysis(analyze(tensors)))
    assert "all are 0" in page.text
    assert page.values("aria-label").count("Singular values of int by rank") == 0
    Page(render_analysis(analyze(nn.Linear(5, 7))))


def test_the_page_is_written_whole(tmp_path, plain):
    path = write_analysis(plain, tmp_path / "new" / "page.html")
    assert path.read_text(encoding="utf-8") == render_analysis(plain)
    assert [entry.name for entry in path.parent.iterdir()] == ["page.html"]


def test_without_matplotlib_one_line_says_what_to_install(tmp_path, plain, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    monkeypatch.setitem(sys.modules, "matplotlib.style", None)
    with pytest.raises(ImportError, match=re.escape('pip install "dynarank[viz]"')):
        write_analysis(plain, tmp_path / "page.html")
    assert list(tmp_path.iterdir()) == []
