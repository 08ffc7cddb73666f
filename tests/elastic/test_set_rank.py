"""Ranks are cut for good, or switched to and back; statistics belong to the ranks they were estimated at."""

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from dynarank.elastic import (
    Elastic,
    order_,
    set_rank_,
)
from dynarank.layers.base import AbstractLowRankLayer, low_rank_layers
from dynarank.optim.low_rank_optimizer import LowRankOptimizer

DOUBLE: Any = {"dtype": torch.float64}


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def test_a_cut_network_computes_what_it_computed_before_at_these_ranks_and_trains_on(network: Any):
    model, x = network(), draw(4, 12)
    parameters, optimizer = list(model.parameters()), LowRankOptimizer(model, rank_policy="fixed")
    elastic = Elastic(model)
    elastic.switch_({"0": 3, "2": 5})
    wanted = model(x).detach()
    assert set_rank_(model, {"0": 3}) == {"0": 3, "2": 8}
    set_rank_(model, {"2": 5})
    torch.testing.assert_close(model(x), wanted, atol=1e-12, rtol=0)
    assert all(p is q for p, q in zip(model.parameters(), parameters, strict=True))
    assert [tuple(p.shape) for p in parameters if p.dim() == 2] == [(3, 15), (3, 12), (5, 11), (5, 15)]
    model(x).square().sum().backward()
    optimizer.step()
    assert low_rank_layers(model)["0"].rank == 3


def test_a_cut_waits_for_no_graph_and_changes_nothing_where_one_is_alive(
    network: Any, bits: Any, assert_same_bits: Any
):
    model = network()
    loss, before = model(draw(4, 12)).sum(), bits(model)
    with pytest.raises(RuntimeError, match=r"set_rank_: 0 cannot change its shape now: .* Delete old losses first"):
        set_rank_(model, 0.5)
    assert_same_bits(model, before)
    del loss
    set_rank_(model, 0.5)


def test_switching_there_and_back_leaves_every_bit_and_the_momentum(
    caplog: pytest.LogCaptureFixture, network: Any, bits: Any, assert_same_bits: Any
):
    model, x = network(), draw(4, 12)
    optimizer, elastic = LowRankOptimizer(model, rank_policy="fixed"), Elastic(model)
    for _ in range(2):
        model(x).square().sum().backward()
        optimizer.step()
        optimizer.zero_grad()
    before, outputs = bits(model), model(x)
    elastic.switch_(0.25)
    assert [layer.active_rank for layer in low_rank_layers(model).values()] == [2, 2]
    assert_same_bits(model, before)
    assert not torch.allclose(model(x), outputs)
    elastic.switch_(1.0)
    assert torch.equal(model(x), outputs)
    model(x).square().sum().backward()
    optimizer.step()
    assert not caplog.records


def test_a_block_ends_where_it_began_even_when_it_fails(network: Any):
    model = network()
    elastic = Elastic(model)
    elastic.switch_(0.5)
    with pytest.raises(KeyError), elastic.at({"2": 1}):
        assert [layer.active_rank for layer in low_rank_layers(model).values()] == [8, 1]
        raise KeyError
    assert [layer.active_rank for layer in low_rank_layers(model).values()] == [4, 4]


def test_factors_in_any_gauge_are_put_in_order(network: Any, truncated: Any):
    model, x = network(), draw(4, 12)
    for seed, p in enumerate(model.parameters()):
        p.data.add_(draw(*p.shape, seed=seed))
    wanted = model(x)
    order_(model)
    torch.testing.assert_close(model(x), wanted, atol=1e-10, rtol=0)
    layer: AbstractLowRankLayer = model[0]
    dense = truncated(layer, 3)
    layer.active_rank = 3
    torch.testing.assert_close(layer.weight.as_subclass(Tensor), dense.weight, atol=1e-10, rtol=0)


def batches() -> list[Tensor]:
    return [draw(8, 12, seed=seed) for seed in range(3)]


def statistics_of(first: nn.Module) -> tuple[Tensor, Tensor]:
    """Mean and variance of what the first layer gives to the normalisation: the plain mean over batches."""
    outputs = [first(batch).detach() for batch in batches()]
    return (
        torch.stack([y.mean(0) for y in outputs]).mean(0),
        torch.stack([y.var(0) for y in outputs]).mean(0),
    )


def assert_statistics(model: Any, wanted: tuple[Tensor, Tensor]) -> None:
    torch.testing.assert_close((model[1].running_mean, model[1].running_var), wanted, atol=1e-12, rtol=1e-12)


@pytest.mark.parametrize("training", [True, False])
def test_a_cut_estimates_the_statistics_of_its_ranks(training: bool, network: Any, truncated: Any):
    model = network(norm=True).train(training)
    wanted, momentum = statistics_of(truncated(model[0], 2)), model[1].momentum
    set_rank_(model, 0.25, calibration=iter(batches()))
    assert_statistics(model, wanted)
    assert (model[1].momentum, model[1].training) == (momentum, training)


def test_a_part_in_training_leaves_the_statistics_of_the_whole_alone(network: Any, bits: Any, assert_same_bits: Any):
    model = network(norm=True).train()
    elastic, before = Elastic(model), bits(model)
    with elastic.at(0.5):
        model(draw(8, 12)).sum().backward()
    assert_same_bits(model, before)
    with elastic.at(1.0):
        model(draw(8, 12)).sum().backward()
    assert not torch.equal(model[1].running_mean, before["1.running_mean"])
    elastic.loss(lambda: model(draw(8, 12)), torch.sum, torch.Generator()).backward()
    assert int(model[1].num_batches_tracked) == 2


def test_statistics_of_known_ranks_come_back_without_data(
    network: Any, bits: Any, assert_same_bits: Any, truncated: Any
):
    model = network(norm=True).train()
    for batch in batches():
        model(batch)
    model.eval()
    elastic, before = Elastic(model), bits(model)
    elastic.switch_(0.25, calibration=batches())
    assert_statistics(model, statistics_of(truncated(model[0], 2)))
    elastic.switch_(1.0)
    assert_same_bits(model, before)
    with elastic.at(0.25):
        assert_statistics(model, statistics_of(truncated(model[0], 2)))
    assert_same_bits(model, before)
    model.train()
    with elastic.at(0.25):
        model(draw(8, 12))
    with pytest.raises(ValueError, match="batch normalisation"):  # the model may be another one now
        elastic.switch_(0.25)


@pytest.mark.parametrize(
    "change",
    [
        lambda model: set_rank_(model, 0.5),
        lambda model: Elastic(model).switch_(0.5),
        lambda model: Elastic(model.eval()).at(0.5).__enter__(),
    ],
)
def test_ranks_without_statistics_are_refused(change: Any, network: Any, bits: Any, assert_same_bits: Any):
    model = network(norm=True)
    before = bits(model)
    with pytest.raises(ValueError, match=r"batch normalisation \(1 layers\).* Pass calibration=batches"):
        change(model)
    assert_same_bits(model, before)
    assert model[0].active_rank == model[0].rank == 8


@pytest.mark.parametrize("bad", [[], [draw(1, 12)]])
def test_data_that_do_not_fit_change_nothing(bad: list[Tensor], network: Any, bits: Any, assert_same_bits: Any):
    model = network(norm=True)
    elastic, before = Elastic(model), bits(model)
    for change in (elastic.switch_, lambda ranks, calibration: set_rank_(model, ranks, calibration=calibration)):
        with pytest.raises(ValueError):
            change(0.5, calibration=bad)
        assert_same_bits(model, before)
        assert model[0].active_rank == model[0].rank == 8


def test_ranks_that_stay_need_no_data(network: Any, bits: Any, assert_same_bits: Any):
    model = network(norm=True)
    before = bits(model)
    assert set_rank_(model, 1.0) == {"0": 8, "3": 8}
    Elastic(model).switch_(1.0)
    assert_same_bits(model, before)


def test_ranks_that_were_switched_to_are_cut_without_data(network: Any, truncated: Any):
    model = network(norm=True)
    wanted = statistics_of(truncated(model[0], 2))
    Elastic(model).switch_(0.25, calibration=batches())
    whole = copy.deepcopy(model)
    set_rank_(model, 0.25)
    assert_statistics(model, wanted)
    assert model[0].A.shape[0] == 2
    with pytest.raises(ValueError, match="batch normalisation"):  # the statistics are those of a quarter
        set_rank_(whole, 1.0)
