"""Spare rows: most rank changes keep the shape, the rows stay zero, and the weight moves as without them."""

import itertools
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import Tensor

from dynarank._discovery import discover
from dynarank.integrators.base import AbstractIntegrator
from dynarank.ranks.base import AbstractRankPolicy, Decision, LayerSpectrum, PlanContext
from dynarank.ranks.relative_tail import RelativeTail
from dynarank.schedules.periodic import Periodic

INTEGRATORS = sorted(discover("dynarank.integrators", AbstractIntegrator))


def run(kit: Any, *, rank_multiple: int, steps: int = 24, integrator: str = "tangent_muon", **options: Any) -> Any:
    """Return weights after each step, events, and the shapes and addresses of the first factor."""
    model = kit.make_model(rank=3, rank_multiple=rank_multiple)
    options = {"rank_policy": RelativeTail(tolerance=0.25, growth=0.5), "schedule": Periodic(every=2)} | options
    optimizer = kit.make_optimizer(model, integrator=integrator, weight_decay=0.01, **options)
    weights, places, events = [], [], []
    optimizer.on_rank_event(events.extend)
    for step in range(steps):
        kit.train(model, optimizer, range(step, step + 1))
        weights.append([layer.weight.detach().as_subclass(Tensor).clone() for layer in optimizer.layers.values()])
        if model[0].form == "pair":
            places.append((tuple(model[0].A.shape), model[0].A.data_ptr()))
            for layer in optimizer.layers.values():
                assert not layer.A[layer.rank :].any() and not layer.B[layer.rank :].any()
                assert layer.A[: layer.rank].any(dim=1).all()
    return weights, events, places


@pytest.mark.parametrize("integrator", INTEGRATORS)
def test_spare_rows_change_nothing_but_the_storage(kit, integrator):
    exact, events, _ = run(kit, rank_multiple=1, integrator=integrator)
    spare, same_events, _ = run(kit, rank_multiple=8, integrator=integrator)
    fixed, _, places = run(kit, rank_multiple=64, integrator=integrator)
    assert [(e.layer, e.new_rank, e.candidates) for e in events] == [
        (e.layer, e.new_rank, e.candidates) for e in same_events
    ]
    for a, b, c in zip(exact, spare, fixed, strict=True):
        torch.testing.assert_close(b, a, atol=1e-10, rtol=0)
        torch.testing.assert_close(c, a, atol=1e-10, rtol=0)
    assert {shape for shape, _ in places} == {(12, 20)}


class Script(AbstractRankPolicy):
    """A rank and candidates for each event in turn, the same for all layers."""

    PLAN = ((2, 1), (3, 2), (4, 1), (5, 3), (6, 2), (5, 0), (4, 3), (7, 1), (8, 3), (9, 0), (6, 1), (3, 3))

    def plan(self, spectra: Sequence[LayerSpectrum], context: PlanContext) -> list[Decision]:
        rank, grow = self.PLAN[context.step // 2 - 1]
        return [Decision(min(rank, len(s.sigma)), grow, "script") for s in spectra]


def test_most_rank_changes_keep_shape_and_place(kit):
    _, events, places = run(kit, rank_multiple=8, rank_policy=Script())
    changes = [e for e in events if e.layer == "0" and e.new_rank + e.candidates != e.old_rank]
    moves = sum(a != b for a, b in itertools.pairwise(places))
    assert len(changes) == 9 and moves == 2
    _, _, exact = run(kit, rank_multiple=1, rank_policy=Script())
    assert sum(a != b for a, b in itertools.pairwise(exact)) == 9


def test_spare_rows_stay_exactly_zero_over_many_steps(kit):
    model = kit.make_model(rank=3, rank_multiple=8, dtype=torch.float32)
    optimizer = kit.make_optimizer(model, weight_decay=0.01)
    kit.train(model, optimizer, range(200))
    for layer in optimizer.layers.values():
        assert layer.capacity == 8 and layer.rank == 3
        assert not layer.A[3:].any() and not layer.B[3:].any() and not layer.A.grad[3:].any()


def test_a_state_fits_any_capacity(kit):
    """The state has the rank of the layer, not its capacity: spare rows may differ between the runs."""
    model = kit.make_model(rank=3, rank_multiple=8)
    optimizer = kit.make_optimizer(model)
    kit.train(model, optimizer, range(3))
    again = kit.make_model(rank=2, rank_multiple=8, seed=1)
    resumed = kit.make_optimizer(again)
    again.load_state_dict(model.state_dict())
    resumed.load_state_dict(optimizer.state_dict())
    assert kit.train(again, resumed, range(3, 6)) == kit.train(model, optimizer, range(3, 6))
