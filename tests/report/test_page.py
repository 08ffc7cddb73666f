import math
import re
import subprocess
import sys
from html.parser import HTMLParser

import matplotlib
import pytest

from dynarank.events import RankEvent
from dynarank.history import History
from dynarank.report import write_report
from dynarank.report.page import render

HOSTILE = "<script>alert(1)</script>\"'><img src=x onerror=alert(2)>$x_1$&lt;_"
VOID = ("meta", "br", "wbr", "img", "link", "input", "hr")


class Page(HTMLParser):
    """What a browser would see: every element, attribute, id and text; fails on unbalanced elements."""

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


def record_run(
    history: History, *, layers: list[str], steps: int = 100, name: str = "a run", finish: bool = True
) -> None:
    history.describe(
        name=name,
        dense_parameters=1000,
        ranks=dict.fromkeys(layers, 8),
        shapes={layer: [20, 30] for layer in layers},
        command=f"dynarank train --note {name}",
        seeds=[0],
        config={"note": name},
    )
    for step in range(1, steps + 1):
        history.log(step=step, loss=1 / step, accuracy=1 - 1 / step, learning_rate=0.1)
        if step % 25 == 0:
            for layer in layers:
                history.record(RankEvent(step, layer, 8, 8 - step // 25, 2, 0.01, f"budget {name}"))
            history.spectrum(
                step=step, singular_values={layer: [1.0, 0.1, 1e-8, 0.0][: 5 - step // 25] for layer in layers}
            )
            history.log(
                step=step, deployed_parameters=500, weight_bytes=4000, gradient_bytes=4000, optimizer_bytes=8000
            )
    if finish:
        history.summarise(
            test_accuracy=0.9921,
            test_accuracy_std=0.001,
            seconds=75.0,
            comparison=[
                {"name": name, "test_accuracy": 0.99, "parameters": 500},
                {"name": "dense", "parameters": 1000},
            ],
        )


def page_of(history: History, *, name: str = "a run") -> Page:
    return Page(render(history, name=name))


@pytest.fixture(scope="module")
def full_page() -> str:
    history = History()
    record_run(history, layers=["fc1", "fc2"])
    return render(history, name="a run")


@pytest.fixture(scope="module")
def hostile_page() -> str:
    history = History()
    record_run(history, layers=[HOSTILE, f"{HOSTILE}2"], name=HOSTILE)
    history.log(step=100, **{HOSTILE: 1.0, f"{HOSTILE}_loss": 1.0})
    history.describe(**{HOSTILE: {HOSTILE: HOSTILE}})
    return render(history, name=HOSTILE)


@pytest.mark.parametrize("fixture", ["full_page", "hostile_page"])
def test_the_page_refers_to_nothing_outside_itself(fixture, request):
    text = request.getfixturevalue(fixture)
    page = Page(text)
    references = [value for name in ("href", "src", "xlink:href", "action") for value in page.values(name)]
    assert all(value.startswith("#") for value in references)
    assert "://" not in text and "@import" not in text
    assert all(target.startswith("#") for target in re.findall(r"url\(([^)]*)\)", text))


@pytest.mark.parametrize("fixture", ["full_page", "hostile_page"])
def test_ids_are_unique_and_every_reference_has_its_target(fixture, request):
    text = request.getfixturevalue(fixture)
    page = Page(text)
    ids = page.values("id")
    targets = re.findall(r"url\(#([^)]*)\)", text) + [value[1:] for value in page.values("href")]
    assert len(ids) == len(set(ids))
    assert targets and set(targets) <= set(ids)


def test_names_and_reasons_from_a_run_stay_text(hostile_page):
    page = Page(hostile_page)
    assert not {"script", "img", "iframe", "object", "link"} & set(page.tags)
    assert not [name for name, _ in page.attributes if name.startswith("on")]
    assert f"budget {HOSTILE}" in page.text
    assert f"Singular values of {HOSTILE} over time" in page.values("aria-label")


def test_the_page_forbids_scripts_and_requests(full_page):
    assert "default-src 'none'; style-src 'unsafe-inline'" in Page(full_page).values("content")[0]


def test_the_headline_states_accuracy_size_ranks_and_time(full_page):
    text = Page(full_page).text
    for fact in ("99.21 %", "± 0.10 %", "dense: 1 k", "50.0 %", "2.0 times smaller", "4 · 4", "1 min 15 s"):
        assert fact in text
    assert "interrupted" not in text


def test_every_drawing_follows_the_colours_of_the_page(full_page):
    drawings = re.findall(r"<svg.*?</svg>", full_page, flags=re.DOTALL)
    assert len(drawings) == 8
    for drawing in drawings:
        assert "var(--c0)" in drawing and "var(--rule)" in drawing
        assert not re.findall(r"(?:fill|stroke): ?#[0-9a-f]{6}", drawing)


def test_equal_runs_give_equal_pages_whatever_the_settings_of_matplotlib(full_page):
    history = History()
    record_run(history, layers=["fc1", "fc2"])
    with matplotlib.rc_context({"font.size": 30, "axes.grid": False, "svg.fonttype": "path", "lines.linewidth": 9}):
        assert render(history, name="a run") == full_page
        assert matplotlib.rcParams["font.size"] == 30


def test_a_run_without_summary_is_called_interrupted():
    history = History()
    record_run(history, layers=["fc1"], finish=False)
    text = page_of(history).text
    assert "it was interrupted or has not finished" in text
    assert "Training accuracy" in text and "last value, step 100" in text


def test_a_regression_has_no_word_on_accuracy():
    history = History()
    for step in range(5):
        history.log(step=step, loss=2.0**-step, validation_loss=3.0**-step)
    history.summarise(test_loss=0.0625)
    text = page_of(history).text
    assert "Test loss" in text and "0.0625" in text
    assert "ccuracy" not in text


def test_an_empty_history_gives_a_page():
    assert "No ranks were recorded" in page_of(History()).text


def test_a_single_step_gives_a_page():
    history = History()
    history.describe(ranks={"fc1": 3}, dense_parameters=10)
    history.log(step=1, loss=0.5, accuracy=0.5, deployed_parameters=12, weight_bytes=1, optimizer_bytes=2)
    history.spectrum(step=1, singular_values={"fc1": [1.0, 0.5, 0.0]})
    text = page_of(history).text
    assert "1 step." in text and "more parameters than the dense network" in text


def test_many_layers_get_a_drawing_each_and_most_are_folded():
    layers = [f"model.layers.{index}" for index in range(60)]
    history = History()
    history.describe(ranks={layer: 4 + index for index, layer in enumerate(layers)})
    history.record(RankEvent(10, layers[0], 4, 2, 0, 0.1, "tail"))
    page = page_of(history)
    assert page.tags.count("svg") == 60
    assert "Show 48 more layers" in page.text and "60 layers, median" in page.text


def test_many_events_are_folded_newest_first():
    history = History()
    for step in range(1, 1102):
        history.record(RankEvent(step, "fc1", step, step + 1, 0, 0.0, f"reason {step}"))
    made = render(history, name="long")
    text = Page(made).text
    assert "101 older entries are in the history file" in text
    assert text.index("reason 1101") < text.index("reason 1100")
    assert ">reason 102<" in made and ">reason 101<" not in made


def test_numbers_that_are_not_finite_do_not_hinder_the_page():
    history = History()
    history.describe(dense_parameters=math.nan)
    for step in range(3):
        history.log(step=step, loss=math.nan, accuracy=math.inf, deployed_parameters=math.nan, seconds=math.nan)
    history.log(step=3, grad_norm=1e30, validation_loss=1e-30)
    history.spectrum(step=1, singular_values={"fc1": [math.nan, math.inf]})
    history.summarise(test_accuracy=math.nan, seconds=math.inf, deployed_parameters=math.nan)
    assert "not finite" in page_of(history).text


@pytest.mark.parametrize(
    "nonsense", ["text", 3, None, [1], {"fc1": "text"}, {"fc1": [3]}, [{}], [{"a": [1, {"b": 2}]}]]
)
def test_facts_of_any_kind_do_not_hinder_the_page(nonsense):
    history = History()
    keys = ("name", "command", "ranks", "shapes", "dense_parameters", "config", "seeds")
    history.describe(**dict.fromkeys(keys, nonsense))
    history.summarise(**dict.fromkeys(("test_accuracy", "comparison", "seconds", "deployed_parameters"), nonsense))
    history.record(RankEvent(10, "fc1", 4, 2, 0, 0.1, "tail"))
    assert "fc1" in page_of(history).text


def test_a_long_run_stays_a_small_page():
    history = History()
    for step in range(30_000):
        history.log(step=step, loss=1 + 0.1 * math.sin(step * step))
    assert len(render(history, name="long")) < 100_000


def test_the_page_lies_beside_the_history(tmp_path):
    record_run(History(tmp_path / "history.jsonl"), layers=["fc1"], steps=2)
    assert write_report(tmp_path) == tmp_path / "report.html"
    assert write_report(tmp_path / "history.jsonl") == tmp_path / "report.html"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["history.jsonl", "report.html"]


def test_the_page_can_lie_elsewhere(tmp_path):
    record_run(History(tmp_path / "seed0.jsonl"), layers=["fc1"], steps=2)
    (tmp_path / "pages").mkdir()
    assert write_report(tmp_path / "seed0.jsonl", tmp_path / "pages") == tmp_path / "pages" / "report.html"
    assert write_report(tmp_path / "seed0.jsonl", tmp_path / "new" / "a.html").read_text().startswith("<!DOCTYPE html>")


def test_a_page_without_a_name_is_called_after_its_directory(tmp_path):
    run = tmp_path / "lenet"
    History(run / "history.jsonl").log(step=1, loss=0.5)
    page = Page(write_report(run).read_text())
    assert "lenet · dynarank" in page.text
    assert str(tmp_path) not in page.text


def test_a_missing_history_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"no history at .*history\.jsonl"):
        write_report(tmp_path)


def test_without_matplotlib_one_line_says_what_to_install(tmp_path, monkeypatch):
    record_run(History(tmp_path / "history.jsonl"), layers=["fc1"], steps=2)
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    monkeypatch.setitem(sys.modules, "matplotlib.style", None)
    with pytest.raises(ImportError, match=re.escape('pip install "dynarank[viz]"')):
        write_report(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["history.jsonl"]


def test_no_global_state_of_pyplot_is_used(tmp_path):
    record_run(History(tmp_path / "history.jsonl"), layers=["fc1"], steps=2)
    code = (
        "import sys; from dynarank.report import write_report; write_report(sys.argv[1]); "
        "print('matplotlib.pyplot' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code, tmp_path], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"
