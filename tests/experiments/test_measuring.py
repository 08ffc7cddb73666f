"""What is counted equals what torch itself counts and stores."""

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from dynarank.experiments import measuring
from dynarank.factorize import deployed_parameters, factorize_, to_plain_
from dynarank.layers.base import low_rank_layers
from dynarank.models import LeNet5
from dynarank.optim.low_rank_optimizer import LowRankOptimizer


def counted_by_torch(model: nn.Module, sample: torch.Tensor) -> int:
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(sample)
    return counter.get_total_flops()


def test_flops_are_those_of_the_deployed_network():
    sample = torch.zeros(1, 1, 28, 28)
    model = LeNet5()
    times = measuring.applications(model, sample)
    assert measuring.flops_per_sample(times, {}) == counted_by_torch(model, sample)
    factorize_(model, rank=3)
    ranks = {name: layer.rank for name, layer in low_rank_layers(model).items()}
    expected = measuring.flops_per_sample(times, ranks)
    to_plain_(model)
    assert expected == counted_by_torch(model, sample)


def test_a_layer_above_break_even_counts_as_dense():
    times = {"fc": ((20, 25), 1)}
    assert measuring.flops_per_sample(times, {"fc": 15}) == measuring.flops_per_sample(times, {}) == 2 * 500


def test_a_layer_that_is_used_twice_counts_twice():
    layer = nn.Linear(4, 4, bias=False)
    assert measuring.applications(nn.Sequential(layer, layer), torch.zeros(1, 4)) == {"0": ((4, 4), 2)}


def test_hooks_are_gone_after_counting():
    model = LeNet5()
    measuring.applications(model, torch.zeros(1, 1, 28, 28))
    assert not any(layer._forward_hooks for layer in model.modules())


def test_parameters_at_other_ranks_are_those_of_a_network_with_these_ranks():
    model, other = LeNet5(), LeNet5()
    factorize_(model, rank=5)
    factorize_(other, rank=2)
    ranks = {name: layer.rank for name, layer in low_rank_layers(other).items()}
    assert measuring.deployed_at(model, ranks) == deployed_parameters(other)


def test_bytes_are_summed_over_all_tensors():
    model = nn.Sequential(nn.Linear(6, 5), nn.ReLU(), nn.Linear(5, 4))
    factorize_(model, rank=2, include_head=True)
    optimizer = LowRankOptimizer(model, lr=0.01)
    before = measuring.bytes_in_training(model, optimizer)
    model(torch.ones(2, 6)).sum().backward()
    optimizer.step()
    after = measuring.bytes_in_training(model, optimizer)
    weights = 4 * sum(p.numel() for p in model.parameters())
    assert (before["weight_bytes"], before["gradient_bytes"], before["optimizer_bytes"]) == (weights, 0, 0)
    assert (after["weight_bytes"], after["gradient_bytes"]) == (weights, weights)
    assert after["optimizer_bytes"] > 0
