"""Layers that go low-rank on the way, against the same training written with dense matrices."""

import copy
from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from dynarank.dense_start.dense_start import DenseStart
from dynarank.events import RankEvent
from dynarank.ranks.base import AbstractRankPolicy, Decision, LayerSpectrum, PlanContext
from dynarank.switches.at_step import AtStep
from dynarank.switches.base import AbstractSwitch

ALL = 10**6


class Ranks(AbstractRankPolicy):
    """The rank that belongs to the last step named, the same for every layer."""

    def __init__(self, by_step: dict[int, int]) -> None:
        self.by_step = by_step
        self.seen: list[tuple[list[LayerSpectrum], PlanContext]] = []

    def plan(self, spectra: Sequence[LayerSpectrum], context: PlanContext) -> list[Decision]:
        self.seen.append((list(spectra), context))
        rank = self.by_step[max(step for step in self.by_step if step <= context.step)]
        return [Decision(min(rank, len(s.sigma)), 0, "scripted") for s in spectra]


class AtSteps(AbstractSwitch):
    """Each layer is ready at a step of its own; what was shown is remembered."""

    def __init__(self, **steps: int) -> None:
        self.steps = {name.removeprefix("_"): step for name, step in steps.items()}
        self.shown: list[tuple[int, list[str]]] = []

    def looks(self, step: int) -> bool:
        return True

    def look(self, step: int, weights: Any, state: Any) -> tuple[frozenset[str], Any]:
        self.shown.append((step, list(weights)))
        return frozenset(name for name in weights if step >= self.steps[name]), state


# name: a layer, the shape of its input, its form
FORMS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...], str]] = {
    "tall": (lambda: nn.Linear(5, 9), (5,), "matrix"),
    "wide": (lambda: nn.Linear(9, 5, bias=False), (9,), "matrix"),
    "square": (lambda: nn.Linear(7, 7), (7,), "matrix"),
    "conv": (lambda: nn.Conv2d(3, 6, 3, padding=1), (3, 5, 4), "matrix"),
    "spatial": (lambda: nn.Conv2d(3, 6, (3, 2), stride=2), (3, 7, 6), "spatial"),
}


def one_layer(form: str, dtype: torch.dtype = torch.float64) -> tuple[Any, Tensor]:
    make, shape, _ = FORMS[form]
    return nn.Sequential(make()).to(dtype), torch.randn(4, *shape, dtype=torch.float64).to(dtype)


def matrix_of(weight: Tensor, form: str) -> Tensor:
    if form == "spatial":
        weight = weight.permute(0, 3, 1, 2).reshape(weight.shape[0] * weight.shape[3], -1)
    return weight.flatten(1)


def mlp(*sizes: int) -> Any:
    torch.manual_seed(0)
    layers = [layer for a, b in pairwise(sizes) for layer in (nn.Linear(a, b), nn.Tanh())]
    return nn.Sequential(*layers[:-1]).double()


def backward(model: nn.Module, x: Tensor) -> Tensor:
    model.zero_grad()
    loss = (model(x) - 1).square().sum() / len(x)
    loss.backward()
    return loss


def train(model: nn.Module, optimizer: torch.optim.Optimizer, x: Tensor, steps: int) -> None:
    for _ in range(steps):
        backward(model, x)
        optimizer.step()


def started(model: nn.Module, optimizer: torch.optim.Optimizer | None = None, **options: Any) -> DenseStart:
    options = {"switch": AtStep(1), "rank_policy": Ranks({0: ALL}), "include_head": True} | options
    return DenseStart(model, optimizer or torch.optim.SGD(model.parameters(), lr=0.1), **options)


def is_low_rank(start: DenseStart) -> str:
    return " ".join(sorted(start.low_rank))


# --- the switch --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("trained", ["core", "factors"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("form", FORMS)
def test_switching_at_full_rank_changes_no_output(form, dtype, trained):
    model, x = one_layer(form, dtype)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    start = started(model, optimizer, keep_dense=False, trained=trained, conv_form=FORMS[form][2])
    before, loss = model(x).detach(), backward(model, x)
    optimizer.step()
    assert is_low_rank(start) == "0" and start.low_rank["0"].rank == start.candidates["0"].full
    exact = 1e-12 if dtype == torch.float64 else 2e-6
    torch.testing.assert_close(model(x), before, atol=exact, rtol=exact)
    torch.testing.assert_close(backward(model, x), loss, atol=exact, rtol=exact)


def test_a_weight_that_has_lost_directions_is_kept_exactly():
    model, x = one_layer("square")
    with torch.no_grad():
        model[0].weight.copy_(torch.outer(model[0].weight[0], model[0].weight[1]))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    started(model, optimizer, keep_dense=False)
    before = model(x).detach()
    train(model, optimizer, x, 1)
    torch.testing.assert_close(model(x), before, atol=1e-13, rtol=0)


@pytest.mark.parametrize("form", FORMS)
def test_after_the_switch_the_gradient_moves_the_weight_within_the_bases(form):
    model, x = one_layer(form)
    bias = model[0].bias
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    start = started(model, optimizer, rank_policy=Ranks({0: 2}), conv_form=FORMS[form][2])
    dense = copy.deepcopy(model)
    train(model, optimizer, x, 1)
    layer: Any = start.low_rank["0"]
    U, V = layer.U.clone(), layer.V.clone()
    for _ in range(2):
        W0 = layer.weight.detach()
        b0 = None if bias is None else bias.detach().clone()
        with torch.no_grad():
            dense[0].weight.copy_(W0)
            if b0 is not None:
                dense[0].bias.copy_(b0)
        backward(dense, x)
        G = matrix_of(dense[0].weight.grad, form)
        train(model, optimizer, x, 1)
        moved = matrix_of(W0, form) - 0.1 * U @ U.T @ G @ V @ V.T
        torch.testing.assert_close(matrix_of(layer.weight.detach(), form), moved, atol=1e-12, rtol=0)
        assert torch.equal(layer.U, U) and torch.equal(layer.V, V)
        assert layer.bias is bias
        if bias is not None:
            torch.testing.assert_close(bias, b0 - 0.1 * dense[0].bias.grad, atol=1e-12, rtol=0)


def test_a_low_rank_layer_holds_no_second_copy_of_itself():
    model = mlp(12, 20, 9)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    start = started(model, optimizer, rank_policy=Ranks({0: 4}))
    train(model, optimizer, torch.ones(2, 12).double(), 1)
    layer: Any = start.low_rank["0"]
    resting = sum(p.numel() for p in layer._resting or ())
    assert sum(t.numel() for t in (layer.S, layer.U, layer.V)) == 16 + 4 * 32 and resting <= 32


def test_hooks_and_attributes_of_a_layer_stay():
    model = mlp(12, 20, 9)
    fired = []
    model[0].register_forward_hook(lambda *_: fired.append("forward"))
    model[0].register_full_backward_hook(lambda *_: fired.append("backward"))
    model[0].note = "mine"
    model[0].eval()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    start = started(model, optimizer, rank_policy=Ranks({0: 4}))
    train(model, optimizer, torch.ones(2, 12, requires_grad=True).double(), 1)
    del fired[:]
    backward(model, torch.ones(2, 12).double().requires_grad_())
    assert fired == ["forward", "backward"] and start.low_rank["0"].note == "mine"
    assert start.low_rank["0"] is model[0] and not model[0].training


# --- refreshes ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("form", FORMS)
def test_a_refresh_that_cuts_is_the_truncated_svd(form):
    model, x = one_layer(form)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    captured: list[Tensor] = []
    optimizer.register_step_post_hook(lambda *_: captured.append(model[0].weight.detach().clone()))
    events: list[RankEvent] = []
    start = started(model, optimizer, rank_policy=Ranks({0: 3, 5: 2}), every=2, conv_form=FORMS[form][2])
    start.on_rank_event(events.extend)
    train(model, optimizer, x, 5)
    W = matrix_of(captured[-1], form)
    U, sigma, Vh = torch.linalg.svd(W)
    layer: Any = start.low_rank["0"]
    assert layer.rank == 2 and float(sigma[2]) > 1e-3 and float(captured[-1].sub(captured[1]).norm()) > 1e-3
    cut = U[:, :2] * sigma[:2] @ Vh[:2]
    torch.testing.assert_close(matrix_of(layer.weight.detach(), form), cut, atol=1e-12, rtol=0)
    torch.testing.assert_close(layer.S.detach(), sigma[:2].diag(), atol=1e-12, rtol=0)
    for basis in (layer.U, layer.V):
        torch.testing.assert_close(basis.T @ basis, torch.eye(2).double(), atol=1e-12, rtol=0)
    assert [(e.step, e.old_rank, e.new_rank, e.reason) for e in events] == [
        (1, min(W.shape), 3, "scripted"),
        (5, 3, 2, "scripted"),
    ]
    assert events[-1].tail == pytest.approx(float(sigma[2] / sigma.norm()), abs=1e-12)


def test_a_refresh_that_cuts_nothing_changes_no_bit():
    model = mlp(12, 20, 9, 4)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    start = started(model, optimizer, rank_policy=Ranks({0: 2}), every=100)
    train(model, optimizer, torch.ones(2, 12).double(), 4)
    before = [(name, t, t.clone()) for name, t in (*model.named_parameters(), *model.named_buffers())]
    state = copy.deepcopy(optimizer.state_dict())
    assert start.refresh() == [] and is_low_rank(start) == "0 2 4"
    after = [*model.named_parameters(), *model.named_buffers()]
    assert all(t is u and n == m and torch.equal(u, c) for (n, t), (m, u, c) in zip(after, before, strict=True))
    torch.testing.assert_close(optimizer.state_dict(), state, atol=0, rtol=0)


def test_optimizer_steps_count_and_the_global_generator_is_left_alone():
    model = mlp(12, 20, 9)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    x = torch.randn(4, 12).double()
    generator = torch.get_rng_state()
    start = started(model, optimizer, switch=AtStep(3), rank_policy=Ranks({0: 4, 5: 2}), every=2)
    ranks = []
    for _ in range(6):
        for _ in range(3):  # accumulation
            model(x).square().mean().backward()
        model.eval()
        model(x)
        model.train()
        optimizer.step()
        optimizer.zero_grad()
        ranks.append([layer.rank for layer in start.low_rank.values()])
    assert ranks == [[], [], [4, 4], [4, 4], [2, 2], [2, 2]] and start.steps == 6
    assert torch.equal(torch.get_rng_state(), generator)


def test_losses_and_graphs_may_be_alive_while_layers_change():
    model, x = one_layer("tall")
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    start = started(model, optimizer, switch=AtStep(2), rank_policy=Ranks({0: 3, 3: 2, 4: 1}), every=1)
    other, kept, ranks = torch.randn_like(x), [], []
    for _ in range(5):
        plain = copy.deepcopy(model)
        loss: Any = plain(other).square().sum() + (plain(x) - 1).square().sum() / len(x)
        expected = torch.autograd.grad(loss, [*plain.parameters()])
        trained = [*model.parameters()]
        graph = model(other).square().sum()
        kept += [backward(model, x), model(x)]
        optimizer.step()
        graph.backward()  # needs no weight that the step has changed in place
        for parameter, gradient in zip(trained, expected, strict=True):
            torch.testing.assert_close(parameter.grad, gradient, atol=1e-12, rtol=0)
        ranks.append([layer.rank for layer in start.low_rank.values()])
    assert ranks == [[], [3], [2], [1], [1]] and len(kept) == 10


# --- which layers, and when --------------------------------------------------------------------------------------


def test_the_window_grows_from_the_last_layer_by_the_part_rounded_up():
    model = mlp(*[8] * 8)  # seven layers
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    start = started(model, optimizer, rank_policy=Ranks({0: 2}), every=2, window=0.3)
    found = []
    for _ in range(6):
        train(model, optimizer, torch.ones(2, 8).double(), 1)
        found.append([int(name) // 2 for name in start.low_rank])
    last = [6, 5, 4]
    assert found == [last, last, [*last, 3, 2, 1], [*last, 3, 2, 1], [*last, 3, 2, 1, 0], [*last, 3, 2, 1, 0]]


def test_rounding_errors_do_not_widen_the_window():
    assert 0.28 * 25 > 7
    model = mlp(*[3] * 26)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    start = started(model, optimizer, rank_policy=Ranks({0: 1}), every=9, window=0.28)
    train(model, optimizer, torch.ones(2, 3).double(), 1)
    assert len(start.low_rank) == 7


@pytest.mark.parametrize(
    ("size", "largest_cut", "ranks"),
    [(16, 0.5, [8, 4, 2, 2]), (11, 0.5, [5, 2, 2, 2]), (10, 0.7, [3, 2, 2, 2]), (9, 0.1, [8, 7, 6, 5])],
)
def test_a_cut_is_limited_also_while_the_layer_is_dense(size, largest_cut, ranks):
    model = mlp(size, size)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    start = started(model, optimizer, rank_policy=Ranks({0: 2}), every=1, largest_cut=largest_cut)
    events: list[RankEvent] = []
    start.on_rank_event(events.extend)
    for rank in ranks:
        train(model, optimizer, torch.ones(2, size).double(), 1)
        assert start.held == {"0": rank}
        smaller = 2 * rank * size < size**2
        assert is_low_rank(start) == ("0" if smaller else "")
        assert not smaller or start.low_rank["0"].rank == rank
    paying = [rank for rank in ranks if 2 * rank * size < size**2]
    assert [event.new_rank for event in events] == sorted(set(paying), reverse=True)


def test_ranks_do_not_grow_between_bases_that_stay():
    model = mlp(12, 20, 9)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    start = started(model, optimizer, rank_policy=Ranks({0: 2, 3: 6}), every=1)
    train(model, optimizer, torch.ones(2, 12).double(), 4)
    assert [layer.rank for layer in start.low_rank.values()] == [2, 2]


def test_without_refreshes_each_layer_is_cut_once_when_it_is_ready():
    model = mlp(12, 12, 12, 12)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    switch = AtSteps(_0=2, _2=4, _4=4)
    start = started(model, optimizer, switch=switch, rank_policy=Ranks({0: 4, 4: 3}))
    train(model, optimizer, torch.ones(2, 12).double(), 7)
    assert {name: layer.rank for name, layer in start.low_rank.items()} == {"0": 4, "4": 3, "2": 3}
    assert switch.shown == [(1, ["0", "2", "4"]), (2, ["0", "2", "4"]), (3, ["2", "4"]), (4, ["2", "4"])]


def test_without_refreshes_a_layer_that_does_not_pay_stays_dense():
    model = mlp(12, 12)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    switch = AtSteps(_0=2)
    start = started(model, optimizer, switch=switch, rank_policy=Ranks({0: 7, 3: 2}))
    train(model, optimizer, torch.ones(2, 12).double(), 5)
    assert list(start.dense) == ["0"] and type(model[0]) is nn.Linear and start.held == {"0": 7}
    assert switch.shown == [(1, ["0"]), (2, ["0"])]  # once it is ready the switch is not asked again


def test_a_layer_that_becomes_ready_between_refreshes_waits_for_the_next():
    model = mlp(12, 12, 12)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    start = started(model, optimizer, switch=AtSteps(_0=2, _2=3), rank_policy=Ranks({0: 3}), every=3)
    found = []
    for _ in range(6):
        train(model, optimizer, torch.ones(2, 12).double(), 1)
        found.append(is_low_rank(start))
    assert found == ["", "0", "0", "0", "0 2", "0 2"]


def test_the_policy_is_told_the_sizes():
    model: Any = nn.Sequential(nn.Linear(12, 20), nn.LayerNorm(20), nn.Linear(20, 9), nn.Linear(9, 4)).double()
    policy = Ranks({0: 3})
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    start = started(model, optimizer, rank_policy=policy, include_head=False, every=1)
    captured = [layer.weight.detach().clone() for layer in (model[0], model[2])]
    optimizer.step()  # without gradients nothing moves
    spectra, context = policy.seen[0]
    others = 20 + 2 * 20 + 9 + 9 * 4 + 4
    assert context == PlanContext(1, 12 * 20 + 20 * 9 + others, others)
    for spectrum, W in zip(spectra, captured, strict=True):
        torch.testing.assert_close(spectrum.sigma, torch.linalg.svdvals(W))
    optimizer.step()
    assert policy.seen[1][1] == PlanContext(2, 12 * 20 + 20 * 9 + others, others) and start.dense == {}
