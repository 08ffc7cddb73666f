"""Steps that take several gradients: ``step(closure)``, what it leaves behind, and where it is refused."""

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from dynarank import LowRankOptimizer
from dynarank.integrators.augmented_bug import AugmentedBUG
from dynarank.layers.linear import LowRankLinear
from dynarank.optim._several import check_closure
from dynarank.ranks.relative_tail import RelativeTail
from dynarank.schedules.periodic import Periodic

SEVERAL = ("unconventional_bug", "rank_adaptive_bug", "abc_psi")


@pytest.fixture(params=SEVERAL)
def integrator(request: pytest.FixtureRequest) -> str:
    return request.param


def closure_of(kit: Any, model: Any, step: int) -> Any:
    return lambda: kit.backward(model, step)


def losses(kit: Any, model: Any, optimizer: Any, steps: range) -> list[float]:
    return [optimizer.step(closure_of(kit, model, step)).item() for step in steps]


def test_the_loss_falls_and_ranks_adapt(kit, integrator):
    model = kit.make_model(rank=3)
    options = {"integrator": integrator, "lr": 0.3, "base_options": {"lr": 0.1}}
    optimizer = kit.make_optimizer(model, **options, rank_policy=RelativeTail(0.05), schedule=Periodic(1, freeze=120))
    ranks: set[int] = set()
    optimizer.on_rank_event(lambda events: ranks.update(e.new_rank for e in events))
    seen = losses(kit, model, optimizer, range(200))
    assert sum(seen[-20:]) < 0.6 * sum(seen[:20])
    assert len(ranks) > 1 and optimizer.frozen
    assert all(layer.form == "pair" and layer.fits(layer.rank) for layer in optimizer.layers.values())


def test_with_an_event_in_every_step_it_is_the_published_method():
    """Dynamical low-rank training by hand: augment, Galerkin step, truncate to the tolerance."""
    torch.manual_seed(0)
    model = nn.Sequential(LowRankLinear(11, 9, rank=1, bias=False)).double()
    optimizer = LowRankOptimizer(
        model, lr=0.2, integrator="rank_adaptive_bug", rank_policy=RelativeTail(0.2, growth=0), schedule=Periodic(1)
    )
    T = torch.randn(9, 11, dtype=torch.float64)

    def closure() -> Tensor:
        model.zero_grad()
        W = model[0].weight.as_subclass(Tensor)
        loss = 0.5 * (W - T).square().sum() + 0.25 * W.pow(4).sum()
        loss.backward()
        return loss

    W, ranks = model[0].to_dense().weight.detach(), []
    for _ in range(12):
        rank = torch.linalg.matrix_rank(W, rtol=1e-7).item()
        U, _, Vh = torch.linalg.svd(W)
        U0, V0, G = U[:, :rank], Vh[:rank].mT, W - T + W**3
        U1, V1 = (torch.linalg.qr(torch.cat(pair, 1))[0] for pair in ((U0, G @ V0), (V0, G.mT @ U0)))
        P, sigma, Qh = torch.linalg.svd(U1.mT @ (W - 0.2 * U1 @ U1.mT @ G @ V1 @ V1.mT) @ V1)
        tails = sigma.square().flip(0).cumsum(0).flip(0).sqrt()
        rank = max(1, int((tails >= 0.2 * sigma.norm()).sum()))
        W = U1 @ P[:, :rank] @ torch.diag(sigma[:rank]) @ Qh[:rank] @ V1.mT
        optimizer.step(closure)
        ranks.append(rank)
        assert model[0].rank == rank
        torch.testing.assert_close(model[0].to_dense().weight.detach(), W, atol=1e-7, rtol=0)
    assert len(set(ranks)) > 1


def test_everything_else_takes_the_last_gradient(kit):
    model = kit.make_model()
    optimizer = kit.make_optimizer(model, integrator="unconventional_bug")
    before, seen = model[4].bias.detach().clone(), []

    def closure() -> Tensor:
        loss = kit.backward(model)
        seen.append(model[4].bias.grad.clone())
        return loss

    optimizer.step(closure)
    assert len(seen) == 2 and not torch.equal(*seen)
    torch.testing.assert_close(model[4].bias.detach(), before - 0.05 * seen[1], atol=1e-14, rtol=0)
    assert all(p.grad is None for p in model.parameters())


@pytest.mark.parametrize("name", [*SEVERAL, "augmented_bug"])
def test_parameters_keep_their_identity_and_their_hooks(kit, name):
    model = kit.make_model()
    chosen = AugmentedBUG(coefficient_steps=2) if name == "augmented_bug" else name
    optimizer = kit.make_optimizer(model, integrator=chosen)
    held, calls = (model[0].A, model[0].B), []
    model[0].A.register_post_accumulate_grad_hook(lambda p: calls.append(p))
    kit.train(model, optimizer, range(1)) if name == "augmented_bug" else losses(kit, model, optimizer, range(1))
    calls.clear()
    for step in range(1, 6):
        kit.backward(model, step)
        loss = None if name == "augmented_bug" else closure_of(kit, model, step)
        optimizer.step() if loss is None else (model.zero_grad(), optimizer.step(loss))
    optimizer.freeze_ranks()
    assert model[0].A is held[0] and model[0].B is held[1]
    kit.backward(model)
    assert calls and all(p is held[0] for p in calls)


def test_it_resumes_to_the_last_bit(kit, integrator):
    options = {"integrator": integrator, "rank_policy": RelativeTail(0.1), "schedule": Periodic(3)}
    model = kit.make_model()
    optimizer = kit.make_optimizer(model, **options)
    losses(kit, model, optimizer, range(7))
    saved = copy.deepcopy((model.state_dict(), optimizer.state_dict()))
    losses(kit, model, optimizer, range(7, 14))
    other = kit.make_model(seed=1)
    other.load_state_dict(saved[0])
    resumed = kit.make_optimizer(other, **options)
    resumed.load_state_dict(saved[1])
    losses(kit, other, resumed, range(7, 14))
    kit.assert_same(kit.snapshot(other, resumed), kit.snapshot(model, optimizer))


# --- failures ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("spoil", ["raise", "nan"])
def test_a_failure_at_the_second_gradient_leaves_everything_as_it_was(kit, integrator, spoil):
    model = kit.make_model()
    optimizer = kit.make_optimizer(model, integrator=integrator)
    losses(kit, model, optimizer, range(2))
    before, held, runs = kit.snapshot(model, optimizer), list(model.parameters()), []

    def closure() -> Tensor:
        runs.append(1)
        if len(runs) == 2 and spoil == "raise":
            raise KeyError("no more data")
        loss = kit.backward(model)
        if len(runs) == 2:
            for p in model.parameters():
                p.grad.fill_(float("nan"))
        return loss

    with pytest.raises(KeyError if spoil == "raise" else RuntimeError, match=r"no more data|0: gradient is not finite"):
        optimizer.step(closure)
    kit.assert_same(kit.snapshot(model, optimizer), before)
    assert all(mine is other for mine, other in zip(model.parameters(), held, strict=True))
    model.zero_grad()
    losses(kit, model, optimizer, range(2, 4))


def test_a_step_with_a_bad_gradient_may_be_skipped(kit, integrator):
    model = kit.make_model()
    optimizer = kit.make_optimizer(model, integrator=integrator, nonfinite="skip")
    before, runs = kit.snapshot(model, optimizer), []

    def closure() -> Tensor:
        runs.append(1)
        loss = kit.backward(model)
        for p in model[2].parameters():
            p.grad[(0,) * p.dim()] = float("inf") if len(runs) == 2 else 1.0
        return loss

    optimizer.step(closure)
    kit.assert_same(kit.snapshot(model, optimizer), before)


def test_without_a_closure_it_says_what_to_do(kit, integrator):
    model = kit.make_model()
    optimizer = kit.make_optimizer(model, integrator=integrator)
    kit.backward(model)
    with pytest.raises(RuntimeError, match=r"takes 2 gradients a step: call optimizer\.step\(closure\)"):
        optimizer.step()


def test_a_grad_scaler_cannot_drive_it(kit, integrator):
    model = kit.make_model(dtype=torch.float32)
    optimizer = kit.make_optimizer(model, integrator=integrator)
    scaler = torch.amp.GradScaler("cpu")
    x, y = kit.batch(0, dtype=torch.float32)
    scaler.scale(nn.functional.cross_entropy(model(x), y)).backward()
    with pytest.raises(RuntimeError, match="GradScaler and trainers that pass no closure"):
        scaler.step(optimizer)


def test_gradients_accumulated_outside_are_refused(kit, integrator):
    model = kit.make_model()
    optimizer = kit.make_optimizer(model, integrator=integrator)
    kit.backward(model, 0)
    with pytest.raises(RuntimeError, match="found gradients from before the closure"):
        optimizer.step(closure_of(kit, model, 1))
    optimizer.zero_grad(set_to_none=False)
    losses(kit, model, optimizer, range(2))


def test_several_processes_are_refused(kit, integrator):
    optimizer = kit.make_optimizer(kit.make_model(), integrator=integrator)
    with pytest.raises(RuntimeError, match="does not average over 4 processes"):
        check_closure(optimizer.integrator, lambda: None, [], processes=4)


def test_a_closure_that_forgets_a_layer_is_refused(kit, integrator):
    model = kit.make_model()
    optimizer = kit.make_optimizer(model, integrator=integrator)
    runs: list[int] = []

    def closure() -> Any:
        runs.append(1)
        return kit.backward(model) if len(runs) == 1 else model.zero_grad()

    with pytest.raises(RuntimeError, match="0 had a gradient when the closure ran first and has none now"):
        optimizer.step(closure)
