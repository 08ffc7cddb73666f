"""Every case of the benchmark: its networks take its batches, its ranks are ranks of its layers."""

import pytest
import torch
from torch import nn

from dynarank._discovery import discover
from dynarank.cost import break_even_rank
from dynarank.experiments.bench.cases.base import AbstractCase, Series
from dynarank.experiments.bench.config import PACKAGE, find_case
from dynarank.factorize import factorize_

CASES = ("convs", "layers", "lenet5", "mlp2048", "mlp5120", "resnet20", "tiny", "transformer_block")
SERIES = [(name, series) for name in CASES for series in find_case(name).series()]


def network(series: Series) -> nn.Module:
    with torch.device("meta"):
        return series.network()


def test_every_case_is_found_and_tells_what_it_is():
    assert tuple(sorted(discover(PACKAGE, AbstractCase))) == CASES
    for name in CASES:
        names = [series.name for series in find_case(name).series()]
        assert len(set(names)) == len(names) > 0


@pytest.mark.parametrize(("case", "series"), SERIES, ids=[f"{name}: {series.name}" for name, series in SERIES])
def test_networks_and_ranks_fit_the_batch(case: str, series: Series):
    outputs = network(series)(torch.empty(series.inputs, device="meta"))
    assert series.loss(outputs).shape == ()
    assert len({str(ranks) for ranks in series.ranks}) == len(series.ranks) > 0
    for ranks in series.ranks:
        report = factorize_(network(series), target_modules=list(ranks), rank_pattern=dict(ranks))
        assert {entry.name: entry.rank for entry in report.factorized} == dict(ranks)
        for entry in report.factorized:
            assert entry.shape is not None and ranks[entry.name] <= break_even_rank(*entry.shape)


def test_the_networks_are_those_that_are_announced():
    def weights(case: str, index: int = 0) -> list[tuple[int, ...]]:
        model = network(find_case(case).series()[index])
        return [tuple(p.shape) for p in model.parameters() if p.dim() > 1]

    assert weights("mlp2048") == [(2048, 784), *3 * [(2048, 2048)], (10, 2048)]
    assert weights("mlp5120") == [(5120, 784), *3 * [(5120, 5120)], (10, 5120)]
    assert weights("tiny") == [*8 * [(64, 64)], (10, 64)]
    blocks = find_case("transformer_block").series()
    assert [series.inputs[0] * series.inputs[1] for series in blocks] == [256, 4096, 256, 4096]
    (only,) = find_case("resnet20").series()
    assert len(only.ranks[0]) == 18 and set(only.ranks[0].values()) == {4, 8, 16}


def test_published_ratios_belong_to_ranks_that_are_measured():
    case = find_case("mlp5120")
    (series,) = case.series()
    assert [(quoted.rank, quoted.to_dense) for quoted in case.quoted] == [("40", 0.42), ("160", 1.21), ("320", 2.67)]
    assert [str(ranks["fc1"]) for ranks in series.ranks] == [quoted.rank for quoted in case.quoted]
    assert {quoted.series for quoted in case.quoted} == {series.name}
