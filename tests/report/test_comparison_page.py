"""The page and the tables of a comparison."""

import csv
from html.parser import HTMLParser

import pytest

from dynarank.report.comparison_drawing import GLYPHS, Place, front, mark
from dynarank.report.comparison_page import render_comparison
from dynarank.report.standings import Ratio, Standing, Standings

ROWS = (
    Standing("dense", lr=1.0, scores={0: 1.5, 1: 1.7}, parameters=1000.0, step=Ratio(1.0, 0.9, 1.1)),
    Standing(
        "low | <b>",
        "5.0 %",
        lr=0.4,
        edge="highest",
        tuning={0.1: 2.0, 0.2: None, 0.4: 1.9},
        scores={0: 1.875},
        diverged=1,
        failure="1 of 2 runs diverged: the loss is nan at step 7.",
        parameters=51.0,
        ranks={"a": 2, "b": 3},
        step=Ratio(0.5, 0.4, 0.6),
    ),
    Standing("other", "5.0 %", failure="failed: KeyError: 'x'"),
)
FOUND = Standings("task & co", "loss", 1000, ROWS, (0, 1), again=Ratio(1.02, 0.9, 1.2), missing=3, command="dynarank x")


class Texts(HTMLParser):
    def __init__(self, page: str) -> None:
        super().__init__()
        self.text = ""
        self.feed(page)

    def handle_data(self, data: str) -> None:
        self.text += data


def test_the_table_says_what_is_known_and_nothing_else():
    assert FOUND.cells(ROWS[0])[:6] == ("dense", "–", "1", "1.6000 ± 0.1414", "2 of 2", "1,000")
    low = FOUND.cells(ROWS[1])
    assert low[:5] == ("low | <b>", "5.0 %", "0.4 (highest)", "1.8750", "1 of 2, 1 diverged")
    assert (low[6], low[-2], low[-1]) == ("5.1 %", "0.50 (0.40–0.60)", "2 3")
    assert FOUND.cells(ROWS[2])[2:] == ("–", "–", "0 of 2", *["–"] * 8)
    assert FOUND.body()[-1][0] == "dense again (A/A)"
    assert FOUND.body()[-1][-2] == "1.02 (0.90–1.20)"


def test_markdown_and_csv_keep_their_columns():
    lines = FOUND.markdown().splitlines()
    table = [line for line in lines if line.startswith("|")]
    assert {line.replace("\\|", "").count("|") for line in table} == {len(FOUND.head()) + 1}
    low = list(csv.DictReader(FOUND.csv().splitlines()))[1]
    assert (low["method"], low["mean"], low["runs"], low["step_low"]) == ("low | <b>", "1.875", "1", "0.4")
    assert low["deviation"] == ""


def test_the_page_escapes_and_tells_everything():
    page = render_comparison(FOUND)
    text = Texts(page).text
    assert "low | <b>" not in page
    for wanted in (
        "task & co",
        "3 runs are missing",
        "low | <b>",
        "1.6000 ± 0.1414",
        "failed: KeyError: 'x'",
        "lower is better",
        "0.4: 1.9000",
        "0.2: –",
    ):
        assert wanted in text
    assert page.count("<svg") == 2


def test_a_comparison_without_any_score_has_a_page():
    text = Texts(render_comparison(Standings("t", "accuracy", 10, (Standing("dense"),), (0,)))).text
    assert "no run has ended yet" in text


@pytest.mark.parametrize("higher", [True, False])
def test_nobody_on_the_front_is_beaten_at_less_cost(higher: bool):
    places = [Place(0, (7 * i) % 11, (5 * i) % 13) for i in range(11)]

    def beaten(place: Place) -> bool:
        better = [p for p in places if p.cost <= place.cost and p is not place]
        return any(p.quality >= place.quality if higher else p.quality <= place.quality for p in better)

    assert front(places, higher_is_better=higher) == sorted(
        (place for place in places if not beaten(place)), key=lambda place: place.cost
    )


def test_no_two_of_many_methods_look_alike():
    assert len({(mark(index), index % 6) for index in range(42)}) == 42
    assert {mark(index) for index in range(7)} == set(GLYPHS)
