"""Convolutions in Tucker format beside matrix layers, driven by the same optimizer, integrators and rank policies."""

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from dynarank import tucker
from dynarank._discovery import discover
from dynarank.factorize import deployed_parameters, factorize_, merge_, to_plain_
from dynarank.factors import FactorPair
from dynarank.integrators.base import AbstractIntegrator
from dynarank.layers.conv2d_tucker import LowRankTuckerConv2d
from dynarank.layers.linear import LowRankLinear
from dynarank.optim.low_rank_optimizer import LowRankOptimizer
from dynarank.ranks.budget import Budget
from dynarank.ranks.fixed import Fixed
from dynarank.ranks.relative_tail import RelativeTail
from dynarank.schedules.periodic import Periodic
from dynarank.tucker import TuckerFactors

METHODS = discover("dynarank.integrators", AbstractIntegrator)
PAIRS = sorted(n for n, cls in METHODS.items() if cls.gradients == 1 and not cls.core_form)  # type: ignore[attr-defined]


def build(ranks: Any = (6, 4), seed: int = 0, dtype: torch.dtype = torch.float64, **more: Any) -> nn.Sequential:
    torch.manual_seed(seed)
    kind: dict[str, Any] = {"dtype": dtype}
    return nn.Sequential(
        nn.Conv2d(2, 6, 3, padding=1, **kind),
        nn.BatchNorm2d(6, **kind),
        nn.ReLU(),
        LowRankTuckerConv2d(6, 10, 3, stride=2, padding=1, ranks=ranks, **kind, **more),
        nn.ReLU(),
        nn.Flatten(),
        LowRankLinear(160, 12, rank=5, **kind),
        nn.ReLU(),
        nn.Linear(12, 3, **kind),
    )


def batches(count: int, seed: int = 1, dtype: torch.dtype = torch.float64) -> list[tuple[Tensor, Tensor]]:
    """Return images whose class is which of three filters answers most."""
    generator = torch.Generator().manual_seed(seed)
    filters = torch.randn(3, 2, 3, 3, generator=generator, dtype=torch.float64)
    found = []
    for _ in range(count):
        x = torch.randn(32, 2, 8, 8, generator=generator, dtype=torch.float64)
        found.append((x.to(dtype), nn.functional.conv2d(x, filters).square().mean((2, 3)).argmax(1)))
    return found


def projected(at: TuckerFactors, G: Tensor) -> Tensor:
    """Return the orthogonal projection of a dense tensor on the span of all derivatives of ``W``, by autograd."""
    given = [U for _, U in at.modes()]

    def weight(core: Tensor, *bases: Tensor) -> Tensor:
        left = iter(bases)
        return TuckerFactors(core, tuple(None if U is None else next(left) for U in at.bases)).to_dense().flatten()

    jacobians = torch.autograd.functional.jacobian(weight, (at.core, *given))
    U, sigma, _ = torch.linalg.svd(torch.cat([J.flatten(1) for J in jacobians], 1), full_matrices=False)
    U = U[:, sigma > 1e-10 * sigma[0]]
    return (U @ (U.mT @ G.flatten())).reshape(G.shape)


def train(model: nn.Module, optimizer: LowRankOptimizer, data: list[tuple[Tensor, Tensor]]) -> list[float]:
    losses = []
    for x, y in data:
        optimizer.zero_grad()
        loss = nn.functional.cross_entropy(model(x), y)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


@pytest.mark.parametrize("name", PAIRS)
@pytest.mark.parametrize("ranks", [(6, 4), (6, 4, 2, 3)], ids=["channels", "all-modes"])
def test_every_integrator_of_pairs_trains_tucker_layers(name: str, ranks: tuple[int, ...]):
    model = build(ranks)
    optimizer = LowRankOptimizer(model, lr=0.02, integrator=name, rank_policy=Fixed())
    losses = train(model, optimizer, batches(60))
    assert sum(losses[-10:]) < 0.9 * sum(losses[:10]), losses
    layer: Any = model[3]
    assert tuple(r for r in layer.ranks if r is not None) == ranks
    for _, U in layer.tucker_point().modes():
        torch.testing.assert_close(U.mT @ U, torch.eye(U.shape[1], dtype=U.dtype), atol=1e-12, rtol=0)


@pytest.mark.parametrize("name", ["augmented_bug", "unconventional_bug"])
def test_integrators_that_leave_the_pair_form_say_so(name: str):
    with pytest.raises(ValueError, match="ranks in several modes"):
        LowRankOptimizer(build(), integrator=name)


@pytest.mark.parametrize("ranks", [(6, 4), (6, 4, 2, 3)], ids=["channels", "all-modes"])
def test_a_small_step_is_that_of_the_projected_dense_gradient(ranks: tuple[int, ...]):
    model = build(ranks)
    layer: Any = model[3]
    at, ((x, y),) = layer.factors(), batches(1)
    weight = layer.to_dense().weight.detach().requires_grad_()
    dense = copy.deepcopy(model)
    dense[3] = layer.to_dense()
    loss = nn.functional.cross_entropy(torch.func.functional_call(dense, {"3.weight": weight}, (x,)), y)
    (G,) = torch.autograd.grad(loss, weight)
    slope = projected(at, G)
    errors = []
    for lr in (1e-2, 5e-3):
        moved = copy.deepcopy(model)
        optimizer = LowRankOptimizer(moved, lr=lr, momentum=0.0, integrator="tangent_heavy_ball", rank_policy=Fixed())
        train(moved, optimizer, [(x, y)])
        step = moved[3].to_dense().weight - weight
        errors.append((step + lr * slope).norm().item() / (lr * slope.norm().item()))
    assert errors[0] < 0.05
    assert errors[1] < 0.6 * errors[0]


def test_momentum_is_carried_through_the_retraction():
    """With momentum, small steps stay by a plain computation that projects and truncates dense tensors."""
    model = build(seed=3)
    layer: Any = model[3]
    optimizer = LowRankOptimizer(model, lr=2e-3, momentum=0.9, integrator="tangent_heavy_ball", rank_policy=Fixed())
    at, start = layer.factors(), layer.to_dense().weight.detach().clone()
    past = torch.zeros_like(start)
    for x, y in batches(15):
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(x), y).backward()
        stored = layer.tucker_point()
        here = tucker.read(stored)
        gradient = tucker.project_gradient(here, tucker.turn_gradient(layer.tucker_gradient(), stored, here))
        slope = projected(at, tucker.dense_tangent(here, gradient))
        past = slope + 0.9 * past
        at = tucker.from_dense(at.to_dense() - 2e-3 * (slope + 0.9 * past), ranks=at.ranks)
        past = projected(at, past)
        optimizer.step()
    moved = (layer.to_dense().weight - start).norm().item()
    assert (at.to_dense() - layer.to_dense().weight).norm().item() < 0.02 * moved


@pytest.mark.parametrize("multiple", [1, 4])
def test_ranks_of_all_modes_follow_a_budget(multiple: int):
    model = build((8, 5), rank_multiple=multiple)
    layer: Any = model[3]
    optimizer = LowRankOptimizer(
        model,
        lr=0.02,
        integrator="tangent_heavy_ball",
        rank_policy=Budget(0.5, growth=0.3),
        schedule=Periodic(every=10, freeze=40),
    )
    seen: list[Any] = []
    optimizer.on_rank_event(seen.extend)
    dense = 2 * 6 * 9 + 6 + 2 * 6 + 12 + 1 + 6 * 10 * 9 + 10 + 160 * 12 + 12 + 12 * 3 + 3
    losses = train(model, optimizer, batches(60))
    assert sum(losses[-10:]) < sum(losses[:10])
    assert {event.layer for event in seen} == {"3[out]", "3[in]", "6"}
    for event in seen:
        assert event.new_rank <= event.old_rank
    last = {event.layer: event for event in seen}
    assert layer.ranks == (last["3[out]"].new_rank, last["3[in]"].new_rank, None, None)
    assert layer.ranks[0] < 8 or layer.ranks[1] < 5
    grown = [e for e in seen if e.layer == "3[in]" and e.candidates]
    assert grown
    assert deployed_parameters(model) <= 0.5 * dense + 1
    if multiple == 1:
        assert tuple(layer.core.shape[:2]) == layer.ranks[:2]


@pytest.mark.parametrize("form", ["tucker", "tucker4"])
def test_a_budget_is_spent_although_a_core_shrinks_with_all_its_ranks_at_once(form: Any):
    model = nn.Sequential(nn.Conv2d(24, 40, 3), nn.ReLU(), nn.Conv2d(40, 32, 3), nn.Flatten(), nn.Linear(32, 3))
    factorize_(model, rank_fraction=0.9, conv_form=form, keep_dense_above_break_even=False)
    dense = 40 * (24 * 9 + 1) + 32 * (40 * 9 + 1) + 32 * 3 + 3
    optimizer = LowRankOptimizer(model, lr=0.02, integrator="tangent_heavy_ball", rank_policy=Budget(0.2))
    model(torch.randn(3, 24, 5, 5)).square().mean().backward()
    optimizer.step()
    optimizer.freeze_ranks()
    assert 0.97 * 0.2 * dense < deployed_parameters(model) <= 0.2 * dense


def test_ranks_grow_from_one():
    model = build((1, 1))
    layer: Any = model[3]
    optimizer = LowRankOptimizer(
        model,
        lr=0.05,
        integrator="tangent_heavy_ball",
        rank_policy=RelativeTail(0.02, growth=1.0),
        schedule=Periodic(every=5, freeze=60),
    )
    losses = train(model, optimizer, batches(70))
    assert layer.ranks[0] >= 3
    assert layer.ranks[1] >= 2
    assert sum(losses[-10:]) < sum(losses[:10])


def test_a_rank_event_keeps_the_momentum_and_nearly_the_weight():
    model = build((6, 4))
    layer: Any = model[3]
    optimizer = LowRankOptimizer(model, lr=0.02, integrator="tangent_heavy_ball", rank_policy=RelativeTail(1e-9))
    train(model, optimizer, batches(8))
    before, kept = layer.to_dense().weight.detach().clone(), optimizer.look("3", layer)[1]
    assert kept is not None
    optimizer.change_ranks()
    assert layer.ranks[0] > 6
    assert layer.ranks[1] > 4
    torch.testing.assert_close(layer.to_dense().weight, before, atol=1e-6, rtol=0)
    point, state = optimizer.look("3", layer)
    assert state is not None
    assert isinstance(point, FactorPair)
    assert tuple(state["Vp"].shape) == (54, layer.rank)
    size = sum(float(value.square().sum()) for value in kept.values())
    assert sum(float(value.square().sum()) for value in state.values()) == pytest.approx(size, rel=0.1)


def run_part(model: nn.Module, optimizer: LowRankOptimizer, part: slice) -> None:
    train(model, optimizer, batches(30, dtype=torch.float32)[part])


@pytest.mark.parametrize("integrator", ["tangent_muon", "tangent_heavy_ball"])
@pytest.mark.parametrize("ranks", [(6, 4), (6, 4, 2, 3)], ids=["channels", "all-modes"])
def test_a_resumed_run_is_bitwise_the_uninterrupted_one(integrator: str, ranks: tuple[int, ...]):
    def start(model: nn.Module) -> LowRankOptimizer:
        return LowRankOptimizer(
            model,
            lr=0.02,
            integrator=integrator,
            rank_policy=RelativeTail(0.3, growth=0.5),
            schedule=Periodic(every=5, freeze=25),
        )

    whole = build(ranks, dtype=torch.float32)
    optimizer = start(whole)
    run_part(whole, optimizer, slice(13))
    saved = copy.deepcopy((whole.state_dict(), optimizer.state_dict()))
    run_part(whole, optimizer, slice(13, 30))

    resumed = build(ranks, dtype=torch.float32, seed=5)
    resumed.load_state_dict(saved[0])
    second = start(resumed)
    second.load_state_dict(saved[1])
    run_part(resumed, second, slice(13, 30))
    for (name, one), (_, two) in zip(whole.state_dict().items(), resumed.state_dict().items(), strict=True):
        torch.testing.assert_close(one, two, atol=0, rtol=0, msg=name)
    layer: Any = whole[3]
    assert layer.ranks != (*ranks, *[None] * (4 - len(ranks)))


def test_what_is_exported_computes_the_same():
    model = build((6, 4))
    optimizer = LowRankOptimizer(model, rank_policy=RelativeTail(0.3), schedule=Periodic(every=10, freeze=30))
    train(model, optimizer, batches(35))
    model.eval()
    ((x, _),) = batches(1, seed=7)
    before = model(x)
    plain, merged = copy.deepcopy(model), copy.deepcopy(model)
    report, _ = to_plain_(plain), merge_(merged)
    assert [(e.form, e.error < 1e-12) for e in report.entries] == [("plain", True), ("plain", True)]
    assert isinstance(merged[3], nn.Conv2d)
    torch.testing.assert_close(merged(x), before, atol=1e-10, rtol=0)
    assert not any(isinstance(m, LowRankTuckerConv2d | LowRankLinear) for m in plain.modules())
    torch.testing.assert_close(plain(x), before, atol=1e-10, rtol=0)
    program = torch.export.export(plain, (x,)).module()
    torch.testing.assert_close(program(x), before, atol=1e-10, rtol=0)
