"""A step trains the whole and a part of the directions; trained so, small ranks work."""

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from dynarank.elastic import (
    Elastic,
    Fractions,
    OneLayer,
)
from dynarank.factorize import factorize_
from dynarank.layers.base import low_rank_layers
from dynarank.optim.low_rank_optimizer import LowRankOptimizer
from dynarank.ranks.budget import Budget
from dynarank.schedules.periodic import Periodic

DOUBLE: Any = {"dtype": torch.float64}


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def test_the_loss_of_a_step_is_the_mean_over_its_ranks_and_so_is_its_gradient(network: Any):
    model, x = network(), draw(4, 12)
    elastic, other = Elastic(model, Fractions((0.25,))), copy.deepcopy(model)
    loss = elastic.loss(lambda: model(x), lambda y: y.square().sum(), torch.Generator())
    loss.backward()
    whole = other(x).square().sum()
    for layer in low_rank_layers(other).values():
        layer.active_rank = 2
    wanted = (whole + other(x).square().sum()) / 2
    wanted.backward()
    torch.testing.assert_close(loss, wanted)
    for p, q in zip(model.parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(p.grad, q.grad)
    assert all(layer.active_rank == 8 for layer in low_rank_layers(model).values())


def test_a_part_imitates_the_whole_and_the_whole_does_not_follow(network: Any):
    model, x = network(), draw(4, 12)
    seen = []

    def imitate(outputs: Tensor, teacher: Tensor) -> Tensor:
        seen.append((outputs, teacher))
        return functional.mse_loss(outputs, teacher)

    elastic = Elastic(model, Fractions((0.5,)), imitate=imitate)
    loss = elastic.loss(lambda: model(x), lambda y: y.square().sum(), torch.Generator())
    ((outputs, teacher),) = seen
    part = (outputs.square().sum() + (outputs - teacher).square().mean()) / 2
    torch.testing.assert_close(loss, (teacher.square().sum() + part) / 2)
    assert outputs.requires_grad and not teacher.requires_grad
    assert torch.equal(teacher, model(x))


def test_a_step_takes_one_forward_pass_without_the_whole(network: Any):
    model, calls = network(), []
    elastic = Elastic(model, Fractions((0.5, 1.0)), full=False)
    generator = torch.Generator().manual_seed(0)
    sampled = [elastic.sample(generator) for _ in range(20)]
    assert all(len(ranks) == 1 for ranks in sampled)
    assert [{}] in sampled and [{"0": 4, "2": 4}] in sampled
    elastic.loss(lambda: calls.append(0) or model(draw(4, 12)), torch.sum, generator)
    assert len(calls) == 1


def test_chance_comes_from_the_generator_alone(network: Any):
    elastic = Elastic(network(), OneLayer())
    runs = []
    for _ in range(2):
        generator = torch.Generator().manual_seed(3)
        runs.append([elastic.sample(generator) for _ in range(50)])
    assert runs[0] == runs[1]
    assert torch.initial_seed() == 0


def test_one_layer_at_a_time_draws_every_pair_alike():
    generator, counts = torch.Generator().manual_seed(0), {}
    for _ in range(6000):
        ((name, rank),) = OneLayer().draw({"a": 1, "b": 5}, generator).items()
        counts[name, rank] = counts.get((name, rank), 0) + 1
    assert len(counts) == 6
    assert all(abs(count - 1000) < 120 for count in counts.values())  # four standard deviations


def test_parts_follow_ranks_that_change_in_training(network: Any):
    model, x, generator = network(), draw(4, 12), torch.Generator().manual_seed(0)
    optimizer = LowRankOptimizer(model, rank_policy=Budget(0.6, growth=0), schedule=Periodic(2))
    elastic = Elastic(model, Fractions((0.5,)))
    for _ in range(5):
        optimizer.zero_grad()
        elastic.loss(lambda: model(x), lambda y: y.square().sum(), generator).backward()
        optimizer.step()
    held = {name: layer.rank for name, layer in low_rank_layers(model).items()}
    assert sum(held.values()) < 16
    assert elastic.sample(generator) == [{}, {name: max(1, round(rank / 2)) for name, rank in held.items()}]


def regression(make: Any, *, elastic: bool) -> tuple[Any, Tensor, Tensor]:
    """Train a network on targets of falling importance."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(10, 14), nn.Tanh(), nn.Linear(14, 10)).double()
    factorize_(model, rank=8, include_head=True, keep_dense_above_break_even=False)
    x = draw(64, 10)
    targets = x @ (draw(10, 10, seed=1) * torch.logspace(0, -1, 10, dtype=torch.float64))
    optimizer, generator = make(model), torch.Generator().manual_seed(0)
    trained = Elastic(model, Fractions((0.125, 0.25, 0.5)))
    for _ in range(300):
        optimizer.zero_grad()
        if elastic:
            loss = trained.loss(lambda: model(x), lambda y: functional.mse_loss(y, targets), generator)
        else:
            loss = functional.mse_loss(model(x), targets)
        loss.backward()
        optimizer.step()
    return model, x, targets


def loss_at(run: tuple[Any, Tensor, Tensor], fraction: float) -> float:
    model, x, targets = run
    with torch.no_grad(), Elastic(model).at(fraction):
        return float(functional.mse_loss(model(x), targets))


OPTIMIZERS = {
    "adamw": lambda model: torch.optim.AdamW(model.parameters(), lr=1e-2, weight_decay=0.0),
    "manifold": lambda model: LowRankOptimizer(model, lr=0.02, rank_policy="fixed"),
}


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_elastic_training_makes_small_ranks_work(optimizer: str, caplog: pytest.LogCaptureFixture, truncated: Any):
    elastic, plain = (regression(OPTIMIZERS[optimizer], elastic=choice) for choice in (True, False))
    for fraction in (0.125, 0.25, 0.5):
        assert loss_at(elastic, fraction) < 0.9 * loss_at(plain, fraction)
    assert not caplog.records  # the factors were never found to be others than the optimizer left
    if optimizer == "manifold":
        for layer in low_rank_layers(elastic[0]).values():
            wanted = truncated(layer, 2).weight
            layer.active_rank = 2
            torch.testing.assert_close(layer.weight.as_subclass(Tensor), wanted, atol=1e-9, rtol=0)
