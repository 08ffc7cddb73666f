"""A rank event is a transaction: all of it happens or nothing, the state fits afterwards, and it is told."""

import copy
import logging
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor

from dynarank._discovery import discover
from dynarank.factors import FactorPair
from dynarank.integrators.augmented_bug import AugmentedBUG
from dynarank.integrators.base import AbstractIntegrator
from dynarank.integrators.tangent_heavy_ball import TangentHeavyBall
from dynarank.optim._layer_state import stored
from dynarank.ranks.base import AbstractRankPolicy, Decision, LayerSpectrum, PlanContext
from dynarank.ranks.fixed import Fixed
from dynarank.ranks.relative_tail import RelativeTail
from dynarank.schedules.periodic import Periodic

INTEGRATORS = sorted(discover("dynarank.integrators", AbstractIntegrator))


@dataclass
class Told(AbstractRankPolicy):
    """Plans what it is told, by layer, and remembers what it saw."""

    decisions: Any
    seen: Any = None

    def plan(self, spectra: Sequence[LayerSpectrum], context: PlanContext) -> list[Decision]:
        self.seen = list(spectra)
        return [self.decisions(s) for s in spectra]


def ready(kit: Any, decide: Any, **options: Any) -> tuple[Any, Any, Told]:
    """A model after four steps without events."""
    model, policy = kit.make_model(rank=5), Told(decide)
    optimizer = kit.make_optimizer(model, rank_policy=policy, **options)
    kit.train(model, optimizer, range(4))
    return model, optimizer, policy


def matrices(optimizer: Any) -> list[Tensor]:
    return [layer.weight.detach().clone() for layer in optimizer.layers.values()]


# --- what an event does ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("integrator", ["tangent_muon", "tangent_heavy_ball", "parallel_bug", "plain_factors"])
@pytest.mark.parametrize(("rank", "grow"), [(2, 0), (5, 2), (3, 4), (1, 0), (5, 100)])
def test_the_weight_is_truncated_best_and_grown_without_moving(kit, integrator, rank, grow):
    _, optimizer, _ = ready(kit, lambda s: Decision(rank, grow, "told"), integrator=integrator)
    before = matrices(optimizer)
    events = optimizer.change_ranks()
    for W, event, layer in zip(before, events, optimizer.layers.values(), strict=True):
        U, sigma, Vh = torch.linalg.svd(W)
        best = U[:, :rank] @ torch.diag(sigma[:rank]) @ Vh[:rank]
        torch.testing.assert_close(layer.weight.detach().as_subclass(Tensor), best, atol=2e-8 * sigma[0].item(), rtol=0)
        assert (event.old_rank, event.new_rank, event.reason) == (5, rank, "told")
        assert event.candidates == min(grow, layer.max_rank - rank) and layer.rank == rank + event.candidates
        assert event.tail == pytest.approx((sigma[rank:5].norm() / sigma.norm()).item(), abs=1e-12)
        floor = layer.factors().sigma / sigma[0]
        assert floor[rank:].numel() == 0 or floor[rank:].max() < 1.1e-8


@pytest.mark.parametrize("integrator", INTEGRATORS)
def test_every_state_has_the_shape_of_a_fresh_one(kit, integrator):
    _, optimizer, _ = ready(kit, lambda s: Decision(2, 3, "told"), integrator=integrator)
    for _ in range(2):
        optimizer.change_ranks()
        for layer in optimizer.layers.values():
            fresh = optimizer.integrator.init(layer.point())
            kept = optimizer.state[stored(layer)[0]]
            assert {k: v.shape for k, v in kept.items()} == {k: v.shape for k, v in fresh.items()}
        assert {id(p) for p in optimizer.state} <= {id(p) for g in optimizer.param_groups for p in g["params"]}


def test_the_momentum_is_carried_along(kit):
    """A cut keeps the projection of the momentum on the smaller tangent space: the next step shows it."""
    _, optimizer, _ = ready(kit, lambda s: Decision(3, 0, "told"), integrator=TangentHeavyBall())
    layer = optimizer.layers["0"]

    def ambient() -> Tensor:
        point, state = optimizer.look("0", layer)
        U, V = ((part / part.norm(dim=1, keepdim=True)).mT for part in (point.A, point.B))
        return U @ state["S"] @ V.mT + state["Up"] @ V.mT + U @ state["Vp"].mT

    before = ambient()
    optimizer.change_ranks()
    W = layer.weight.detach().as_subclass(Tensor)
    U, _, Vh = torch.linalg.svd(W)
    P, Q = U[:, :3] @ U[:, :3].mT, Vh[:3].mT @ Vh[:3]
    torch.testing.assert_close(ambient(), P @ before + before @ Q - P @ before @ Q, atol=1e-12, rtol=0)


def test_growth_follows_the_momentum_first(kit):
    _, optimizer, _ = ready(kit, lambda s: Decision(5, 2, "told"), integrator=TangentHeavyBall())
    layer = optimizer.layers["0"]
    _, state = optimizer.look("0", layer)
    leading = torch.linalg.svd(state["Up"])[0][:, :2]
    optimizer.change_ranks()
    grown = layer.A.detach()[5:] / layer.A.detach()[5:].norm(dim=1, keepdim=True)
    torch.testing.assert_close((grown @ leading).abs(), torch.eye(2, dtype=torch.float64), atol=1e-6, rtol=0)


def test_new_directions_are_the_same_on_every_process_and_differ_between_layers(kit):
    grown = []
    for _ in range(2):
        _, optimizer, _ = ready(kit, lambda s: Decision(5, 2, "told"), integrator="parallel_bug")
        torch.randn(3)  # the global generator plays no part
        optimizer.change_ranks()
        grown.append([layer.A.detach()[5:].clone() for layer in optimizer.layers.values()])
    kit.assert_same(*grown)


def test_a_plan_that_changes_nothing_leaves_every_bit(kit):
    for integrator in ("tangent_muon", "parallel_bug", "plain_factors"):
        model, optimizer, _ = ready(kit, lambda s: Decision(5, 0, "told"), integrator=integrator)
        before = kit.snapshot(model, optimizer)
        assert [event.old_rank - event.new_rank for event in optimizer.change_ranks()] == [0, 0]
        kit.assert_same(kit.snapshot(model, optimizer), before)


def test_a_fixed_policy_keeps_the_rank_of_a_layer_inside_a_cycle(kit):
    model = kit.make_model(rank=3)
    optimizer = kit.make_optimizer(model, integrator="augmented_bug", rank_policy=Fixed(), schedule=Periodic(every=4))
    for step in range(9):
        kit.train(model, optimizer, range(step, step + 1))
        assert model[0].rank == (3 if step % 4 == 3 else 6)


def test_spectra_are_the_singular_values_of_the_weights(kit):
    for integrator in INTEGRATORS:
        _, optimizer, policy = ready(kit, lambda s: Decision(1, 0, "told"), integrator=integrator)
        before = matrices(optimizer)
        optimizer.change_ranks()
        for W, spectrum in zip(before, policy.seen, strict=True):
            rank = len(spectrum.sigma)
            torch.testing.assert_close(spectrum.sigma, torch.linalg.svdvals(W)[:rank], atol=1e-12, rtol=0)
            assert spectrum.sigma.dtype == torch.float64 and spectrum.shape == W.shape


def test_callbacks_get_one_event_per_layer_at_each_moment_of_the_schedule(kit):
    model = kit.make_model(rank=5)
    optimizer = kit.make_optimizer(
        model, rank_policy=RelativeTail(growth=0.5), schedule=Periodic(every=3, start=2, freeze=9)
    )
    events = []
    optimizer.on_rank_event(events.append)
    kit.train(model, optimizer, range(14))
    assert [[(e.step, e.layer) for e in group] for group in events] == [
        [(step, "0"), (step, "2")] for step in (5, 8, 9)
    ]
    assert optimizer.frozen and all(e.candidates == 0 for e in events[-1])


# --- dry runs and freezing ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("integrator", INTEGRATORS)
def test_a_dry_run_tells_the_next_event_and_changes_nothing(kit, integrator):
    model = kit.make_model(rank=5)
    optimizer = kit.make_optimizer(model, integrator=integrator, rank_policy="relative_tail")
    kit.train(model, optimizer, range(4))
    before = kit.snapshot(model, optimizer)
    planned = optimizer.plan_ranks()
    kit.assert_same(kit.snapshot(model, optimizer), before)
    events = {e.layer: (e.new_rank, e.reason) for e in optimizer.change_ranks()}
    assert events == {name: (d.rank, d.reason) for name, d in planned.items()}


@pytest.mark.parametrize("integrator", INTEGRATORS)
def test_freezing_drops_candidates_and_later_calls_change_nothing(kit, integrator):
    model = kit.make_model(rank=3)
    policy = RelativeTail(tolerance=1e-5, growth=1.0)  # floors are below, directions in use above
    optimizer = kit.make_optimizer(model, integrator=integrator, rank_policy=policy)
    kit.train(model, optimizer, range(2))
    if integrator != "augmented_bug":
        optimizer.change_ranks()
        assert model[0].rank == 6
    wanted = {name: d.rank for name, d in optimizer.plan_ranks().items()}
    told = []
    optimizer.on_rank_event(told.append)
    events = optimizer.freeze_ranks()
    assert told == [events] and {e.layer: e.new_rank for e in events} == wanted
    assert all(layer.form == "pair" and layer.rank == wanted[n] for n, layer in optimizer.layers.items())
    before = kit.snapshot(model, optimizer)
    assert optimizer.freeze_ranks() == [] == optimizer.change_ranks()
    kit.assert_same(kit.snapshot(model, optimizer), before)
    kit.train(model, optimizer, range(2, 30))
    optimizer.freeze_ranks()
    assert {n: layer.rank for n, layer in optimizer.layers.items()} == wanted and len(told) <= 2


def test_a_frozen_run_goes_on_with_its_cycles_and_ends_in_the_pair_form(kit):
    model = kit.make_model(rank=3)
    optimizer = kit.make_optimizer(
        model,
        integrator=AugmentedBUG(coefficient_steps=3),
        rank_policy=RelativeTail(0.3),
        schedule=Periodic(2, freeze=5),
    )
    kit.train(model, optimizer, range(5))
    final = {name: layer.rank for name, layer in optimizer.layers.items()}
    forms = []
    for step in range(5, 15):
        kit.train(model, optimizer, range(step, step + 1))
        forms.append(model[0].form)
    assert forms == ["core", "core", "core", "pair"] * 2 + ["core", "core"]
    before = matrices(optimizer)
    events = optimizer.freeze_ranks()
    assert {e.layer: e.new_rank for e in events} == final == {n: m.rank for n, m in optimizer.layers.items()}
    for W, layer in zip(before, optimizer.layers.values(), strict=True):
        U, sigma, Vh = torch.linalg.svd(W)
        best = U[:, : layer.rank] @ torch.diag(sigma[: layer.rank]) @ Vh[: layer.rank]
        assert layer.form == "pair"
        torch.testing.assert_close(layer.weight.detach().as_subclass(Tensor), best, atol=1e-7, rtol=0)
    kit.train(model, optimizer, range(15, 18))


def test_a_layer_frozen_inside_a_cycle_comes_back_to_the_pair_form(kit):
    model = kit.make_model(rank=3)
    optimizer = kit.make_optimizer(model, integrator="augmented_bug")
    kit.train(model, optimizer, range(2))
    model[0].requires_grad_(False)
    optimizer.freeze_ranks()
    assert [layer.form for layer in optimizer.layers.values()] == ["pair", "pair"] and model[0].rank == 3
    assert not model[0].A.requires_grad


# --- failures ----------------------------------------------------------------------------------------------------


class Broken(Exception):
    pass


class BrokenIntegrator(TangentHeavyBall):
    """Fails, or answers wrongly, in one of its functions for the second layer."""

    def __init__(self, place: str = "") -> None:
        self.place, self.armed = place, False

    def _fail(self, place: str, width: int) -> bool:
        return self.armed and self.place == place and width == 9  # the second layer has 9 outputs

    def transport(self, state: Any, old: Any, new: Any) -> Any:
        if self._fail("transport", old.shape[0]):
            raise Broken("broken")
        found = super().transport(state, old, new)
        return {**found, "Up": found["Up"][:, :1]} if self._fail("shape", old.shape[0]) else found

    def directions(self, state: Any, point: Any) -> Any:
        if self._fail("directions", point.shape[0]):
            raise Broken("broken")
        return super().directions(state, point)

    def advance(self, point: Any, *args: Any, **options: Any) -> Any:
        if self._fail("advance", point.shape[0]):
            raise Broken("broken")
        return super().advance(point, *args, **options)

    def init(self, point: Any) -> Any:
        if self._fail("init", point.shape[0]):
            raise Broken("broken")
        return super().init(point)


@pytest.mark.parametrize("place", ["transport", "directions", "init", "shape"])
def test_a_failure_inside_the_integrator_leaves_everything(kit, place):
    integrator = BrokenIntegrator(place)
    model, optimizer, _ = ready(kit, lambda s: Decision(3, 1, "told"), integrator=integrator)
    integrator.armed = True
    before = kit.snapshot(model, optimizer)
    error, message = (RuntimeError, "Nothing was changed") if place == "shape" else (Broken, "broken")
    with pytest.raises(error, match=message):
        optimizer.change_ranks()
    kit.assert_same(kit.snapshot(model, optimizer), before)
    integrator.armed = False
    assert len(optimizer.change_ranks()) == 2


def test_a_failure_in_the_step_leaves_everything(kit):
    integrator = BrokenIntegrator("advance")
    model, optimizer, _ = ready(kit, lambda s: Decision(3, 1, "told"), integrator=integrator)
    integrator.armed = True
    kit.backward(model)
    before = kit.snapshot(model, optimizer)
    with pytest.raises(Broken):
        optimizer.step()
    kit.assert_same(kit.snapshot(model, optimizer), before)


@pytest.mark.parametrize(
    ("decide", "error", "message"),
    [
        (lambda s: {}[s.name], KeyError, "0"),
        (lambda s: Decision(0, 0, "none"), ValueError, "Told must keep 1 to 5 directions of 0"),
        (lambda s: Decision(6, 0, "more"), ValueError, "Told must keep 1 to 5 directions of 0"),
        (lambda s: Decision(3, -1, "less"), ValueError, "try 0 or more"),
    ],
)
def test_a_failure_inside_the_policy_leaves_everything(kit, decide, error, message):
    model, optimizer, _ = ready(kit, decide)
    before = kit.snapshot(model, optimizer)
    with pytest.raises(error, match=message):
        optimizer.change_ranks()
    with pytest.raises(error):
        optimizer.freeze_ranks()
    kit.assert_same(kit.snapshot(model, optimizer), before)
    assert not optimizer.frozen


def test_a_plan_for_too_few_layers_is_refused(kit):
    class Short(AbstractRankPolicy):
        def plan(self, spectra: Sequence[LayerSpectrum], context: PlanContext) -> list[Decision]:
            return [Decision(1, 0, "one")]

    model = kit.make_model()
    optimizer = kit.make_optimizer(model, rank_policy=Short())
    before = kit.snapshot(model, optimizer)
    with pytest.raises(ValueError, match="Short planned 1 of 2 layers"):
        optimizer.change_ranks()
    kit.assert_same(kit.snapshot(model, optimizer), before)


def test_events_see_factors_that_others_changed(kit):
    model, optimizer, policy = ready(kit, lambda s: Decision(3, 1, "told"))
    with torch.no_grad():
        model[0].A[0] *= 3
        model[0].A[1] += model[0].A[2]
    before = matrices(optimizer)
    optimizer.change_ranks()
    torch.testing.assert_close(policy.seen[0].sigma, torch.linalg.svdvals(before[0])[:5], atol=1e-12, rtol=0)
    assert isinstance(optimizer.look("0", model[0])[0], FactorPair)
    kit.train(model, optimizer, range(4, 8))


def test_the_log_stays_quiet_in_an_ordinary_run(kit, caplog):
    model = kit.make_model(rank=5)
    optimizer = kit.make_optimizer(model, rank_policy="relative_tail", schedule=Periodic(every=2, freeze=9))
    with caplog.at_level(logging.INFO):
        kit.train(model, optimizer, range(12))
    assert caplog.records == []
    assert copy.copy(optimizer.layers).keys() == {"0", "2"}
