"""Ordinary loops in which a graph is alive when ranks change: never an error, and training goes on correctly."""

import logging
from collections.abc import Sequence

import pytest
import torch
from torch import nn

from dynarank.ranks.base import AbstractRankPolicy, Decision, LayerSpectrum, PlanContext
from dynarank.schedules.periodic import Periodic


class Script(AbstractRankPolicy):
    """Ranks and candidates by step, the same for every layer."""

    def __init__(self, plan: dict[int, tuple[int, int]]) -> None:
        self._plan = plan

    def plan(self, spectra: Sequence[LayerSpectrum], context: PlanContext) -> list[Decision]:
        rank, grow = self._plan[context.step]
        return [Decision(min(rank, len(s.sigma)), grow, f"scripted {rank} + {grow}") for s in spectra]


CUT = {step: (max(5 - step, 2), 0) for step in range(1, 30)}
GROW = {step: (min(2 + step, 8), 1) for step in range(1, 30)}


def build(kit, plan, **options):
    model = kit.make_model(rank=5, **options)
    optimizer = kit.make_optimizer(model, rank_policy=Script(plan), schedule=Periodic(every=1))
    events = []
    optimizer.on_rank_event(events.extend)
    return model, optimizer, events


def test_the_last_loss_may_be_alive(kit):
    model, optimizer, events = build(kit, CUT)
    factors = [model[0].A, model[0].B]
    for step in range(4):
        loss = kit.backward(model, step)
        optimizer.step()
    assert loss.grad_fn is not None
    assert all(a is b for a, b in zip(factors, (model[0].A, model[0].B), strict=True)) and model[0].A.shape == (2, 20)
    assert [e.reason for e in events if e.layer == "0"] == [f"scripted {r} + 0" for r in (4, 3, 2, 2)]


def keep_validation_loss(kit, model, held):
    x, y = kit.batch(77)
    held.append(nn.functional.cross_entropy(model(x), y))


def keep_activation(kit, model, held):
    held.append(model[:3](kit.batch(77)[0]))


def keep_graph(kit, model, held):
    x, y = kit.batch(77)
    loss = nn.functional.cross_entropy(model(x), y)
    loss.backward(retain_graph=True)
    held.append(loss)


def keep_view(kit, model, held):
    held.append(model[0].weight)


HOLDERS = [keep_validation_loss, keep_activation, keep_graph, keep_view]


@pytest.mark.parametrize("hold", HOLDERS)
def test_a_live_graph_postpones_the_change_of_capacity_and_says_so(kit, hold, caplog):
    model, optimizer, events = build(kit, CUT)
    held = []
    for step in range(2):
        kit.backward(model, step)
        hold(kit, model, held)
        optimizer.step()
    assert model[0].rank == model[2].rank == 3  # cut at once
    assert model[0].capacity == 5 and not model[0].A[3:].any() and not model[0].B[3:].any()
    assert all("capacity stays for now: 0: a live graph" in event.reason for event in events)
    assert all(event.reason.startswith("scripted") for event in events)
    assert "times in a row" not in caplog.text
    kit.backward(model, 2)
    hold(kit, model, held)
    optimizer.step()
    assert caplog.text.count("factors could not change their shape 3 times in a row") == 1

    held.clear()
    kit.train(model, optimizer, range(3, 4))
    assert model[0].capacity == model[0].rank == 2
    assert "capacity" not in events[-1].reason


@pytest.mark.parametrize("plan", [CUT, GROW], ids=["cut", "grow"])
@pytest.mark.parametrize("hold", HOLDERS)
def test_a_postponed_run_moves_as_an_undisturbed_one(kit, hold, plan):
    """Within the capacity; growth beyond it has to wait, so a growing layer gets spare rows here."""
    runs = []
    for holder in (None, hold):
        model, optimizer, events = build(kit, plan, rank_multiple=8)
        losses = []
        for step in range(6):
            losses.append(kit.backward(model, step).item())
            held = []
            if holder is not None:
                gradients = [p.grad.clone() for p in model.parameters()]
                holder(kit, model, held)
                for p, g in zip(model.parameters(), gradients, strict=True):
                    p.grad.copy_(g)
            optimizer.step()
        runs.append((losses, [e.new_rank for e in events], model[2].weight.detach()))
    assert runs[0][1] == runs[1][1]
    torch.testing.assert_close(runs[0][0], runs[1][0], atol=1e-10, rtol=0)


def test_growth_waits_for_room_and_goes_on(kit):
    model, optimizer, events = build(kit, GROW)
    held = []
    kit.backward(model)
    keep_validation_loss(kit, model, held)
    optimizer.step()
    assert (model[0].rank, model[0].capacity, events[0].new_rank, events[0].candidates) == (4, 5, 3, 1)
    kit.backward(model, 1)
    optimizer.step()  # rank 4 and 1 candidate fit into the 5 rows
    assert (model[0].rank, model[0].capacity) == (5, 5)
    kit.backward(model, 2)
    optimizer.step()
    assert (model[0].rank, events[-2].candidates) == (5, 0) and "capacity stays" in events[-2].reason
    held.clear()
    losses = kit.train(model, optimizer, range(3, 6))
    assert (model[0].rank, model[0].capacity) == (8, 8)
    assert all(loss < 3 for loss in losses)


def test_the_last_cut_frees_its_memory_as_soon_as_it_can(kit):
    model = kit.make_model(rank=5)
    optimizer = kit.make_optimizer(model, rank_policy=Script(CUT), schedule=Periodic(every=1, freeze=2))
    events, held = [], []
    optimizer.on_rank_event(events.extend)
    for step in range(4):
        kit.backward(model, step)
        keep_validation_loss(kit, model, held)
        optimizer.step()
    assert optimizer.frozen and (model[0].rank, model[0].capacity) == (3, 5) and len(events) == 4
    held.clear()
    kit.train(model, optimizer, range(4, 5))
    assert (model[0].rank, model[0].capacity) == (3, 3) and len(events) == 4


def test_one_layer_that_refuses_holds_all_back(kit):
    model, optimizer, events = build(kit, CUT)
    kit.backward(model)
    held = model[2].weight
    optimizer.step()
    assert held.grad_fn is not None
    assert [layer.capacity for layer in optimizer.layers.values()] == [5, 5]
    assert all("2: a live graph" in event.reason for event in events)


def test_hooks_attributes_and_identity_survive_rank_events(kit):
    model, optimizer, _ = build(kit, CUT)
    parameter, seen = model[0].A, []
    parameter.label = "mine"
    parameter.register_hook(lambda gradient: seen.append(("tensor", tuple(gradient.shape))))
    parameter.register_post_accumulate_grad_hook(lambda p: seen.append(("accumulated", tuple(p.grad.shape))))
    kit.train(model, optimizer, range(3))
    assert seen == [(kind, (rows, 20)) for rows in (5, 4, 3) for kind in ("tensor", "accumulated")]
    assert model[0].A is parameter is optimizer.param_groups[0]["params"][0] and parameter.label == "mine"


def test_lists_of_losses_kept_by_the_user_are_harmless(kit, caplog):
    model, optimizer, _ = build(kit, CUT)
    losses = []
    with caplog.at_level(logging.WARNING):
        for step in range(6):
            losses.append(kit.backward(model, step))
            optimizer.step()
    assert model[0].capacity == 2 and caplog.text == ""
