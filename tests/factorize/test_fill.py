"""``factorize_(parameters=...)``: ranks that fill a size, about the same part of the full rank everywhere."""

from typing import Any

import pytest
from torch import nn

from dynarank.factorize import deployed_parameters, factorize_
from dynarank.models import LeNet5

SHAPES = {"0": (16, 12), "2": (16, 16)}
OTHERS = 16 + 16 + 3 * 16 + 3


def network() -> nn.Sequential:
    return nn.Sequential(nn.Linear(12, 16), nn.ReLU(), nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 3))


def stored(ranks: dict[str, int]) -> int:
    return OTHERS + sum(min(ranks[name] * (m + n), m * n) for name, (m, n) in SHAPES.items())


@pytest.mark.parametrize("parameters", [150, 222, 300, 401])
def test_not_one_rank_more_would_fit(parameters: int):
    model = network()
    report = factorize_(model, parameters=parameters)
    ranks = {entry.name: entry.rank for entry in report.factorized if entry.rank is not None}
    assert ranks.keys() == SHAPES.keys()
    assert deployed_parameters(model) == stored(ranks) <= parameters
    for name, shape in SHAPES.items():
        more = {**ranks, name: ranks[name] + 1}
        assert more[name] > min(shape) or stored(more) > parameters
    parts = [ranks[name] / min(shape) for name, shape in SHAPES.items()]
    assert max(parts) - min(parts) <= 1 / 6


@pytest.mark.parametrize("form", ["matrix", "spatial", "tucker", "tucker4"])
@pytest.mark.parametrize("part", [0.04, 0.1, 0.3])
def test_a_part_of_a_convolutional_network(form: Any, part: float):
    model = LeNet5()
    allowed = part * deployed_parameters(model)
    factorize_(model, parameters=part, conv_form=form)
    assert 0.96 * allowed < deployed_parameters(model) <= allowed


def test_a_rank_of_its_own_stays():
    model = LeNet5()
    report = factorize_(model, parameters=30_000, rank_pattern={"conv2": 7})
    ranks = {entry.name: entry.rank for entry in report.factorized}
    assert ranks["conv2"] == 7
    assert 30_000 - 1300 < deployed_parameters(model) <= 30_000


def test_the_whole_model_fits_itself():
    model, whole = network(), deployed_parameters(network())
    factorize_(model, parameters=1.0, keep_dense_above_break_even=False)
    assert [layer.rank for layer in (model[0], model[2])] == [12, 16]  # type: ignore[union-attr]
    assert deployed_parameters(model) == whole


def test_too_few_parameters_are_refused_and_the_model_is_left_alone():
    model = network()
    with pytest.raises(ValueError, match=r"100 parameters are too few .* the smallest ranks everywhere take 143"):
        factorize_(model, parameters=100)
    assert isinstance(model[0], nn.Linear)


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"parameters": 300, "rank": 3}, ValueError, "takes one of rank, rank_fraction and parameters, got rank and"),
        ({"parameters": 1.5}, ValueError, r"a fraction must be in \(0, 1\], got 1.5. Pass an int for a number"),
        ({"parameters": 0}, ValueError, "parameters must be at least 1, got 0"),
        ({"parameters": "300"}, TypeError, "parameters must be an int or a float"),
        ({"parameters": True}, TypeError, "parameters must be an int or a float"),
    ],
)
def test_what_cannot_be(options: Any, error: type[Exception], message: str):
    with pytest.raises(error, match=message):
        factorize_(network(), **options)
