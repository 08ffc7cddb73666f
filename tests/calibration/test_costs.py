"""What each form of a layer takes, and where one becomes cheaper than another."""

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import nn

from dynarank.calibration import AbstractCosts, MeasuredCosts, RuleOfThumb, Work
from dynarank.cost_model.work import FORMS, PURPOSES, Form, Purpose
from dynarank.layers.conv2d import LowRankConv2d
from dynarank.layers.linear import LowRankLinear
from dynarank.measure import flops

SHAPES = [(64, 64), (7, 5), (1, 9), (300, 784), (784, 300), (512, 512), (10, 4000)]
COUNTS = [1, 8, 65, 500, 4096]


@pytest.mark.parametrize("form", FORMS)
def test_multiplications_are_those_of_the_layer(form: Form):
    layer: Any = nn.Linear(30, 20) if form == "dense" else LowRankLinear(30, 20, rank=4)
    if form == "multiplied":
        layer.multiplies_out_from = 1
    counted = flops(layer, torch.zeros(5, 7, 30))
    assert 2 * Work("linear", (20, 30), rank=4, rows=35).multiplications(form) == counted
    assert 2 * Work("linear", (20, 30), rank=4, rows=5, calls=7).multiplications("dense") == 2 * 35 * 600


@pytest.mark.parametrize("form", FORMS)
def test_multiplications_are_those_of_the_convolution(form: Form):
    options: Any = {"stride": 2, "padding": 1}
    layer: Any = nn.Conv2d(3, 8, 3, **options) if form == "dense" else LowRankConv2d(3, 8, 3, **options, rank=2)
    if form == "multiplied":
        layer.multiplies_out_from = 1
    work = Work("conv2d", (8, 27), rank=2, rows=5 * 4 * 3)
    assert 2 * work.multiplications(form) == flops(layer, torch.zeros(5, 3, 7, 6))


def by_search(costs: AbstractCosts, work: Work, purpose: Purpose, other: Form) -> int:
    """Return the last rank before factors stay dearer than another form, found by trying all."""
    ranks = range(1, min(work.shape) + 1)
    found = {rank: costs.of(replace(work, rank=rank), purpose) for rank in ranks}
    return max((r for r, cost in found.items() if cost["factored"] <= cost[other] * (1 + 1e-12)), default=0)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("rows", COUNTS)
@pytest.mark.parametrize("purpose", PURPOSES)
def test_break_even_is_what_a_search_finds(costs: MeasuredCosts, shape: tuple[int, int], rows: int, purpose: Purpose):
    work = Work("linear", shape, rank=1, rows=rows)
    for by in (costs, RuleOfThumb()):
        assert by.break_even_rank(work, purpose) == by_search(by, work, purpose, "dense")
        assert by.multiplies_out_from(work, purpose) == by_search(by, work, purpose, "multiplied") + 1


def test_with_fewer_rows_than_the_harmonic_size_multiplying_out_never_pays():
    # rows r (m + n) > rows m n + m n r needs rows > mn / (m + n).
    work = Work("linear", (512, 512), rank=512, rows=256)
    assert RuleOfThumb().multiplies_out_from(work, "training") == 513
    counts = {form: work.multiplications(form) for form in FORMS}
    assert counts["factored"] == counts["multiplied"] - 512 * 512 * 256
    assert RuleOfThumb().multiplies_out_from(replace(work, rows=1024), "training") <= 512


@pytest.mark.parametrize(
    ("shape", "rows", "fraction"),
    [
        ((512, 512), 128, 0.85),  # 3.4e7
        ((512, 512), 64, 0.6),  # 1.7e7
        ((256, 256), 64, 0.4),  # 4.2e6
        ((64, 1024), 64, 0.0),  # 4.2e6, but narrow
        ((256, 256), 16, 0.0),  # 1.0e6
        ((64, 64), 1024, 0.0),  # 4.2e6, but narrow
        ((64, 64), 2048, 0.6),  # 8.4e6, narrow or not
        ((10, 512), 8192, 0.85),
    ],
)
def test_the_rule_for_training(shape: tuple[int, int], rows: int, fraction: float):
    work, rule = Work("linear", shape, rank=1, rows=rows), RuleOfThumb()
    assert rule.fraction(work, "training") == fraction
    rank = rule.break_even_rank(work, "training")
    assert rank <= fraction * work.break_even < rank + 1


@pytest.mark.parametrize(("shape", "fraction"), [((65, 400), 0.8), ((64, 400), 0.0), ((400, 64), 0.0)])
def test_the_rule_for_inference(shape: tuple[int, int], fraction: float):
    assert RuleOfThumb().fraction(Work("linear", shape, rank=1, rows=1), "inference") == fraction


def test_a_rule_has_no_seconds_and_a_measurement_has(costs: MeasuredCosts):
    work = Work("conv2d", (8, 27), rank=2, rows=60, calls=3)
    assert RuleOfThumb().seconds(work, "training") is None
    seconds = costs.seconds(work, "inference")
    down = 5e-5 + 3e-11 * 60 * 27 * 2 + 1e-9 * (60 * 27 + 60 * 2 + 27 * 2)
    up = 5e-5 + 3e-11 * 60 * 2 * 8 + 1e-9 * (60 * 2 + 60 * 8 + 2 * 8)
    assert seconds["factored"] == pytest.approx(3 * (down + up), rel=1e-12)
    assert costs.seconds(work, "training")["factored"] == pytest.approx(3 * seconds["factored"], rel=1e-12)
