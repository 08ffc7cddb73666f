"""Which layers Cuttlefish leaves dense: by a cost made by hand, and what the measurement sees and leaves alone."""

import copy
from collections.abc import Sequence
from math import prod
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from dynarank.dense_start._speedups import measured_speedup
from dynarank.dense_start.cuttlefish import AtLatest, cuttlefish
from dynarank.layers.base import AbstractLowRankLayer
from dynarank.ranks.fraction import Fraction
from dynarank.switches.at_step import AtStep
from dynarank.switches.settled_stable_rank import SettledStableRank

OVERHEAD = 3000  # multiplications that a call of a layer takes


class Net(nn.Module):
    """A convolution, a layer that is called twice, one whose input needs no gradient, one that is never called."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 16, 3)
        self.twice = nn.Linear(64, 64)
        self.small = nn.Linear(64, 24)
        self.aside = nn.Linear(40, 50)
        self.head = nn.Linear(24, 5)
        self.norm = nn.BatchNorm2d(16)

    def forward(self, x: Tensor) -> Tensor:
        features = torch.relu_(self.norm(self.conv(x))).flatten(1)  # (N, 64)
        return self.head(self.small(self.twice(self.twice(features))))


def batch() -> Tensor:
    return torch.randn(6, 3, 4, 4, generator=torch.Generator().manual_seed(0))


def work(layer: Any, inputs: Sequence[Tensor]) -> float:
    """Multiplications of all calls."""
    weights = [layer.A, layer.B] if isinstance(layer, AbstractLowRankLayer) else [layer.weight]
    positions = 4 if any(x.dim() == 4 for x in inputs) else 1
    rows = sum(len(x) * positions for x in inputs)
    return rows * sum(weight.numel() for weight in weights) + OVERHEAD * len(weights) * len(inputs)


def by_hand(dense: nn.Module, low_rank: nn.Module, inputs: Sequence[Tensor]) -> float:
    return work(dense, inputs) / work(low_rank, inputs)


def start(model: Any, **options: Any) -> Any:
    chosen = {"every": 1, "least_speedup": 1.5, "batch": batch(), "speedup": by_hand} | options
    return cuttlefish(model, torch.optim.SGD(model.parameters(), lr=0.01), **chosen)


def test_layers_below_the_bound_stay_dense_with_the_reason():
    found = start(Net())
    assert list(found.candidates) == ["twice"]
    dense, low_rank = 6 * 64 * 24 + OVERHEAD, 6 * 6 * (64 + 24) + 2 * OVERHEAD  # a quarter of rank 24
    assert found.left_dense["small"] == f"{dense / low_rank:.2f} times as fast at rank 6, below least_speedup = 1.5"
    dense, low_rank = 24 * 27 * 16 + OVERHEAD, 24 * 4 * (27 + 16) + 2 * OVERHEAD
    assert found.left_dense["conv"].startswith(f"{dense / low_rank:.2f} times as fast at rank 4")
    assert found.left_dense["aside"] == "the batch does not call it, so what it would gain is not known"
    assert found.left_dense["head"].startswith("classifier head") and len(found.left_dense) == 4


def test_only_layers_that_gain_go_low_rank():
    model = Net()
    found = start(model, latest=2, rank_policy=Fraction(0.25))
    for _ in range(3):
        found.optimizer.zero_grad()
        model(batch()).square().mean().backward()
        found.optimizer.step()
    assert list(found.low_rank) == ["twice"] and type(model.small) is nn.Linear


@pytest.mark.parametrize(("least", "names"), [(0.1, ["conv", "twice", "small"]), (1.325, ["twice", "small"])])
def test_the_bound_decides(least, names):
    assert list(start(Net(), least_speedup=least).candidates) == names


def test_without_a_bound_nothing_is_timed():
    def never(*given: Any) -> float:
        raise AssertionError

    found = start(Net(), least_speedup=None, batch=None, speedup=never)
    assert list(found.candidates) == ["conv", "twice", "small", "aside"]
    assert list(found.left_dense) == ["head"]


def test_what_is_timed_is_what_the_layer_sees():
    model, x, seen = Net(), batch(), {}

    def look(dense: nn.Module, low_rank: Any, inputs: Sequence[Tensor]) -> float:
        name = next(name for name, module in model.named_modules() if module is dense)
        seen[name] = inputs
        assert low_rank.rank == low_rank.max_rank // 4
        assert not {id(p) for p in low_rank.parameters()} & {id(p) for p in model.parameters()}
        assert low_rank(inputs[0]).shape == dense(inputs[0]).shape
        return 2.0

    start(model, batch=x, speedup=look)
    model.eval()
    first = torch.relu(model.norm(model.conv(x))).flatten(1)
    assert list(seen) == ["conv", "twice", "small"]
    assert torch.equal(seen["conv"][0], x) and not seen["conv"][0].requires_grad
    torch.testing.assert_close(list(seen["twice"]), [first, model.twice(first)])
    assert all(x.requires_grad and x.is_leaf for x in seen["twice"])


def test_inputs_are_as_they_were_when_the_layer_was_called():
    model, held, seen = nn.Sequential(nn.Linear(12, 30), nn.Linear(30, 20), nn.Linear(20, 3)), [], []
    model[1].register_forward_pre_hook(lambda layer, inputs: held.append(inputs[0]))

    def overwrite(layer: nn.Module, inputs: Any) -> None:
        held[0].data.zero_()

    model[2].register_forward_pre_hook(overwrite)
    start(model, batch=torch.ones(4, 12), speedup=lambda dense, low_rank, inputs: seen.append(inputs[0]) or 2.0)
    assert torch.equal(seen[1], model[0](torch.ones(4, 12)))


def test_a_layer_is_timed_in_the_precision_in_which_it_is_called():
    model, types = Net(), []

    def forward(model: nn.Module, x: Tensor) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            return model(x)

    def look(dense: nn.Module, low_rank: nn.Module, inputs: Sequence[Tensor]) -> float:
        types.append((dense(inputs[0]).dtype, low_rank(inputs[0]).dtype))
        return 2.0

    start(model, forward=forward, speedup=look)
    assert set(types) == {(torch.bfloat16, torch.bfloat16)} and len(types) == 3
    assert not torch.is_autocast_enabled("cpu")


def test_measuring_leaves_everything_as_it_was():
    model: Any = Net().train()
    called: list[int] = []
    model.twice.register_forward_hook(lambda *given: called.append(1))
    model.norm.eval()
    before, x = copy.deepcopy(model.state_dict()), batch()
    given, generator = x.clone(), torch.random.get_rng_state()
    start(model, batch=x, speedup=measured_speedup, least_speedup=1e-6)
    torch.testing.assert_close(dict(model.state_dict()), dict(before), atol=0, rtol=0)
    assert all(p.grad is None for p in model.parameters())
    assert model.training and not model.norm.training
    assert torch.equal(torch.random.get_rng_state(), generator) and torch.equal(x, given)
    assert len(called) == 2  # the one forward pass


def test_the_measurement_knows_large_from_small():
    layer = nn.Linear(700, 700)
    x = torch.randn(64, 700, requires_grad=True)
    assert prod(layer.weight.shape) > 20 * 8 * 1400
    assert measured_speedup(layer, nn.Sequential(nn.Linear(700, 8), nn.Linear(8, 700)), [x]) > 1.5
    assert x.grad is None and layer.weight.grad is None


@pytest.mark.parametrize(
    ("options", "kind", "message"),
    [
        ({"batch": None}, TypeError, "least_speedup and batch go together, batch is missing"),
        ({"least_speedup": None}, TypeError, "least_speedup and batch go together, least_speedup is missing"),
        ({"least_speedup": 0.0}, ValueError, "least_speedup must be above 0, got 0.0"),
        ({"least_speedup": 99.0}, ValueError, r"no layer could go low-rank: conv \(.* below least_speedup = 99\)"),
        ({"latest": 0}, ValueError, "latest must be at least 1, got 0"),
    ],
)
def test_what_cannot_be_is_refused_and_nothing_changes(options, kind, message):
    model: Any = Net()
    with pytest.raises(kind, match=message):
        start(model, **options)
    model(batch()).sum().backward()
    assert type(model.twice) is nn.Linear


def test_at_the_latest_all_layers_are_ready():
    switch = AtLatest(SettledStableRank(every=2), 5)
    assert [step for step in range(1, 8) if switch.looks(step)] == [2, 4, 5, 6, 7]
    state, weights = switch.init(), {"a": torch.eye(4), "b": torch.eye(3)}
    for step in (2, 4):
        ready, state = switch.look(step, weights, state)
        assert ready == frozenset()
    assert switch.look(5, weights, state)[0] == {"a", "b"}
    assert AtLatest(AtStep(3), 5).look(3, weights, {})[0] == {"a", "b"}
