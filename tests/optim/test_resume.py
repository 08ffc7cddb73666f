"""A resumed run equals the uninterrupted one to the last bit: factors, losses, ranks, optimizer state."""

import copy
import io
from functools import partial
from typing import Any

import pytest
import torch
from torch.optim.lr_scheduler import CosineAnnealingLR

from dynarank._discovery import discover
from dynarank.integrators.augmented_bug import AugmentedBUG
from dynarank.integrators.base import AbstractIntegrator
from dynarank.layers.base import low_rank_layers
from dynarank.ranks.relative_tail import RelativeTail
from dynarank.schedules.periodic import Periodic

INTEGRATORS = sorted(discover("dynarank.integrators", AbstractIntegrator))
BASES: dict[str, dict[str, Any]] = {
    "adamw": {"base": torch.optim.AdamW, "base_options": {"lr": 0.01}},
    "fused": {"base": torch.optim.AdamW, "base_options": {"lr": 0.01, "fused": True}},
    "sgd": {"base": torch.optim.SGD, "base_options": {"lr": 0.05, "momentum": 0.9}},
}
STEPS = 16


class Run:
    """A model, its optimizer and a scheduler, with ranks that move every four steps."""

    def __init__(self, kit: Any, *, rank: int, seed: int, dtype: torch.dtype = torch.float64, **options: Any) -> None:
        self.kit, self.model = kit, kit.make_model(rank=rank, seed=seed, dtype=dtype)
        options = {"rank_policy": RelativeTail(tolerance=0.3, growth=0.5), "schedule": Periodic(every=4)} | options
        self.optimizer = kit.make_optimizer(self.model, weight_decay=0.01, **options)
        self.scheduler = CosineAnnealingLR(self.optimizer, T_max=STEPS)
        self.events: list[Any] = []
        self.optimizer.on_rank_event(self.events.extend)

    def go(self, steps: range) -> list[float]:
        losses = []
        for step in steps:
            losses += self.kit.train(self.model, self.optimizer, range(step, step + 1))
            self.scheduler.step()
        return losses

    def saved(self) -> Any:
        """The state dicts after a trip through a file that holds tensors and plain data only."""
        file = io.BytesIO()
        torch.save([t.state_dict() for t in (self.model, self.optimizer, self.scheduler)], file)
        file.seek(0)
        return torch.load(file, weights_only=True)

    def load(self, states: Any) -> None:
        for thing, state in zip((self.model, self.optimizer, self.scheduler), states, strict=True):
            thing.load_state_dict(state)


def assert_resumes(kit: Any, at: int, **options: Any) -> Run:
    whole = Run(kit, rank=4, seed=0, **options)
    whole.go(range(at))
    states, before = whole.saved(), len(whole.events)
    losses = whole.go(range(at, STEPS))
    resumed = Run(kit, rank=2, seed=1, **options)
    resumed.load(states)
    assert resumed.go(range(at, STEPS)) == losses
    assert resumed.events == whole.events[before:]
    kit.assert_same(kit.snapshot(resumed.model, resumed.optimizer), kit.snapshot(whole.model, whole.optimizer))
    return whole


@pytest.mark.parametrize("base", BASES)
@pytest.mark.parametrize("integrator", INTEGRATORS)
@pytest.mark.parametrize("at", [2, 8, 9])
def test_a_resumed_run_equals_the_uninterrupted_one(kit, integrator, base, at):
    whole = assert_resumes(kit, at, integrator=integrator, **BASES[base])
    assert any(event.new_rank != event.old_rank or event.candidates for event in whole.events)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("integrator", INTEGRATORS)
def test_it_resumes_in_other_dtypes(kit, integrator, dtype):
    assert_resumes(kit, 6, integrator=integrator, dtype=dtype, **BASES["sgd"])


def test_augmented_bug_resumes_inside_its_cycle(kit):
    integrator = AugmentedBUG(coefficient_steps=3)
    run = Run(kit, rank=4, seed=0, integrator=integrator)
    run.go(range(6))
    assert {layer.form for layer in run.optimizer.layers.values()} == {"core"}
    for at in range(5, 10):
        assert_resumes(kit, at, integrator=integrator)


@pytest.mark.parametrize("integrator", INTEGRATORS)
def test_it_resumes_after_ranks_froze(kit, integrator):
    schedule = Periodic(every=4, freeze=6)
    whole = assert_resumes(kit, 7, integrator=integrator, schedule=schedule)
    assert whole.optimizer.frozen and max(event.step for event in whole.events) == 6


def test_it_resumes_with_spare_rows_and_after_a_deep_copy(kit):
    model = kit.make_model(rank_multiple=8)
    optimizer = kit.make_optimizer(model)
    kit.train(model, optimizer, range(3))
    again, twin = copy.deepcopy((model, optimizer))
    assert twin.param_groups[0]["params"][0] is again[0].A and twin.base.param_groups[0] is twin.param_groups[1]
    assert kit.train(again, twin, range(3, 6)) == kit.train(model, optimizer, range(3, 6))
    kit.assert_same(again.state_dict(), model.state_dict())


def test_a_layer_that_never_stepped_has_no_state_and_resumes(kit):
    model = kit.make_model()
    model[0].requires_grad_(False)
    optimizer = kit.make_optimizer(model)
    kit.train(model, optimizer, range(3))
    again = kit.make_model(seed=1)
    resumed = kit.make_optimizer(again)
    again.load_state_dict(model.state_dict())
    resumed.load_state_dict(optimizer.state_dict())
    model[0].requires_grad_(True)
    assert kit.train(again, resumed, range(3, 6)) == kit.train(model, optimizer, range(3, 6))


# --- what is refused ---------------------------------------------------------------------------------------------


def refusals(kit: Any) -> dict[str, tuple[Any, Any, str]]:
    """For each mistake: an optimizer, the state it is given, and what the message says."""
    model = kit.make_model(rank=3)
    optimizer = kit.make_optimizer(model, base=torch.optim.AdamW, base_options={"lr": 0.01})
    kit.train(model, optimizer, range(2))
    state = optimizer.state_dict()
    cycle = kit.make_model(rank=3)
    mid_cycle = kit.make_optimizer(cycle, integrator="augmented_bug")
    kit.train(cycle, mid_cycle, range(2))
    adamw = {"base": torch.optim.AdamW, "base_options": {"lr": 0.01}}
    other_head = kit.make_model(rank=3)
    other_head[4] = torch.nn.Linear(9, 5).double()
    sgd = torch.optim.SGD(kit.make_model().parameters(), lr=0.1)
    return {
        "ranks": (
            kit.make_optimizer(kit.make_model(rank=2), **adamw),
            state,
            r"0: the saved state .* model's checkpoint",
        ),
        "form": (
            kit.make_optimizer(kit.make_model(rank=3), integrator="augmented_bug"),
            mid_cycle.state_dict(),
            "groups of .* model's checkpoint",
        ),
        "integrator": (
            kit.make_optimizer(kit.make_model(), integrator="parallel_bug"),
            state,
            "(TangentMuon|GaugeFixedMuon).*ParallelBUG",
        ),
        "plain": (kit.make_optimizer(kit.make_model()), sgd.state_dict(), "without 'low_rank'"),
        "layers": (kit.make_optimizer(kit.make_conv_model()), state, "low-rank layers"),
        "dense": (kit.make_optimizer(other_head, **adamw), state, "4.weight: the saved exp_avg has shape"),
        "dtype": (kit.make_optimizer(kit.make_model(dtype=torch.bfloat16), **adamw), state, "bfloat16"),
    }


@pytest.mark.parametrize("mistake", ["ranks", "form", "integrator", "plain", "layers", "dense", "dtype"])
def test_a_state_that_does_not_fit_is_refused_and_nothing_changes(kit, mistake):
    optimizer, state, message = refusals(kit)[mistake]
    if mistake in ("ranks", "integrator", "plain"):
        kit.train(optimizer.model, optimizer, range(1))
    before = kit.snapshot(optimizer.model, optimizer)
    with pytest.raises(ValueError, match=message):
        optimizer.load_state_dict(state)
    kit.assert_same(kit.snapshot(optimizer.model, optimizer), before)


def test_a_state_of_other_factors_starts_its_momentum_afresh_and_says_so(kit, caplog):
    model = kit.make_model()
    optimizer = kit.make_optimizer(model)
    kit.train(model, optimizer, range(3))
    stranger = kit.make_model(seed=1)
    resumed, fresh = kit.make_optimizer(stranger), kit.make_model(seed=1)
    resumed.load_state_dict(optimizer.state_dict())
    assert kit.train(stranger, resumed, range(2)) == kit.train(fresh, kit.make_optimizer(fresh), range(2))
    assert "0: the factors are not those that the loaded optimizer state belongs to" in caplog.text
    assert set(low_rank_layers(model)) == {"0", "2"}


@pytest.mark.parametrize("integrator", INTEGRATORS)
def test_convolutions_and_their_norms_resume(kit, integrator):
    def build(rank: int) -> tuple[Any, Any]:
        model = kit.make_conv_model(rank=rank)
        policy, schedule = RelativeTail(0.3, growth=0.5), Periodic(every=2)
        return model, kit.make_optimizer(model, integrator=integrator, rank_policy=policy, schedule=schedule)

    def go(model: Any, optimizer: Any, steps: range) -> list[float]:
        def closure(step: int) -> torch.Tensor:
            generator = torch.Generator().manual_seed(step)
            x = torch.randn(8, 2, 5, 5, generator=generator, dtype=torch.float64)
            optimizer.zero_grad()
            loss = (model(x) - x.mean(dim=(1, 2, 3)).unsqueeze(1)).square().mean()
            loss.backward()
            return loss

        return [kit.take_step(optimizer, partial(closure, step)).item() for step in steps]

    model, optimizer = build(3)
    go(model, optimizer, range(5))
    states = copy.deepcopy((model.state_dict(), optimizer.state_dict()))
    again, resumed = build(1)
    again.load_state_dict(states[0])
    resumed.load_state_dict(states[1])
    assert go(again, resumed, range(5, 10)) == go(model, optimizer, range(5, 10))
    kit.assert_same(kit.snapshot(again, resumed), kit.snapshot(model, optimizer))
