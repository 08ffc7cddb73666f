"""Whatever an ordinary training loop does with an optimizer works."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from dynarank.layers.linear import LowRankLinear
from dynarank.schedules.periodic import Periodic


def weights(model: nn.Module) -> dict[str, Tensor]:
    """``W`` of each low-rank layer and every other tensor."""
    dense = {f"{n}.weight": m.weight.detach().clone() for n, m in model.named_modules() if isinstance(m, LowRankLinear)}
    factors = {id(p) for m in model.modules() if isinstance(m, LowRankLinear) for p in (m.A, m.B)}
    return dense | {n: p.detach().clone() for n, p in model.named_parameters() if id(p) not in factors}


def assert_close(found: dict[str, Tensor], expected: dict[str, Tensor], *, atol: float = 1e-12) -> None:
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        torch.testing.assert_close(
            found[name], tensor, atol=atol, rtol=0, msg=lambda text, name=name: f"{name}: {text}"
        )


def test_accumulated_gradients_are_the_gradient_of_the_whole_batch(kit):
    results = []
    for parts in (1, 4):
        model = kit.make_model()
        optimizer = kit.make_optimizer(model)
        for step in range(3):
            optimizer.zero_grad()
            x, y = kit.batch(step)
            for some, labels in zip(x.chunk(parts), y.chunk(parts), strict=True):
                (nn.functional.cross_entropy(model(some), labels) / parts).backward()
            optimizer.step()
        results.append(weights(model))
    assert_close(*results)


def test_clipping_works_over_the_groups(kit):
    model = kit.make_model()
    optimizer = kit.make_optimizer(model)
    kit.backward(model)
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    assert {id(p) for p in parameters} == {id(p) for p in model.parameters()}
    norm = torch.nn.utils.clip_grad_norm_(parameters, 0.01)
    assert norm > 0.01
    torch.testing.assert_close(
        torch.nn.utils.get_total_norm([p.grad for p in parameters]).item(), 0.01, rtol=1e-4, atol=0
    )

    before = weights(model)
    optimizer.step()
    other = kit.make_model()
    slow = kit.make_optimizer(other)
    kit.backward(other)
    for p in other.parameters():
        p.grad.mul_(0.01 / (norm + 1e-6))
    slow.step()
    assert_close(weights(model), weights(other))
    assert any(not torch.equal(before[n], w) for n, w in weights(model).items())


@pytest.mark.parametrize("to_none", [True, False])
def test_zero_grad_reaches_every_parameter(kit, to_none):
    model = kit.make_model()
    optimizer = kit.make_optimizer(model)
    kit.backward(model)
    optimizer.zero_grad(set_to_none=to_none)
    assert all((p.grad is None) if to_none else not p.grad.any() for p in model.parameters())


@pytest.mark.parametrize("to_none", [True, False])
def test_both_ways_to_zero_gradients_train_alike(kit, to_none):
    model = kit.make_model(rank=5)
    optimizer = kit.make_optimizer(model, integrator="parallel_bug", rank_policy="relative_tail", schedule=Periodic(2))
    reference = kit.make_model(rank=5)
    other = kit.make_optimizer(reference, integrator="parallel_bug", rank_policy="relative_tail", schedule=Periodic(2))
    for step in range(5):
        optimizer.zero_grad(set_to_none=to_none)
        x, y = kit.batch(step)
        nn.functional.cross_entropy(model(x), y).backward()
        optimizer.step()
    kit.train(reference, other, range(5))
    assert_close(weights(model), weights(reference))


def test_a_closure_is_called_once_with_gradients_enabled(kit):
    model, reference = kit.make_model(), kit.make_model()
    optimizer, calls = kit.make_optimizer(model), []

    def closure() -> Tensor:
        calls.append(torch.is_grad_enabled())
        return kit.backward(model)

    loss = optimizer.step(closure)
    assert calls == [True] and loss.item() == kit.train(reference, kit.make_optimizer(reference), range(1))[0]
    kit.assert_same(model.state_dict(), reference.state_dict())


def test_hooks_around_the_step_are_called(kit):
    model = kit.make_model()
    optimizer, seen = kit.make_optimizer(model), []
    optimizer.register_step_pre_hook(lambda o, args, kwargs: seen.append(o.steps))
    optimizer.register_step_post_hook(lambda o, args, kwargs: seen.append(o.steps))
    kit.train(model, optimizer, range(1))
    assert seen == [0, 1]


# --- GradScaler --------------------------------------------------------------------------------------------------


def scaled_step(kit: Any, model: nn.Module, optimizer: Any, scaler: Any, step: int, *, unscale: bool = False) -> None:
    optimizer.zero_grad()
    x, y = kit.batch(step, dtype=torch.float32)
    scaler.scale(nn.functional.cross_entropy(model(x), y)).backward()
    if unscale:
        scaler.unscale_(optimizer)
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1e3)
    scaler.step(optimizer)
    scaler.update()


@pytest.mark.parametrize("unscale", [True, False])
@pytest.mark.parametrize("fused", [True, False])
def test_a_grad_scaler_changes_nothing_but_the_scale(kit, unscale, fused):
    options = {"base": torch.optim.AdamW, "base_options": {"lr": 0.01, "fused": fused}}
    model, reference = (kit.make_model(dtype=torch.float32) for _ in range(2))
    optimizer, scaler = kit.make_optimizer(model, **options), torch.amp.GradScaler("cpu", init_scale=2.0**10)
    for step in range(4):
        scaled_step(kit, model, optimizer, scaler, step, unscale=unscale)
    kit.train(reference, kit.make_optimizer(reference, **options), range(4))
    assert optimizer.steps == 4
    assert_close(weights(model), weights(reference), atol=1e-5)


def test_an_overflow_skips_the_whole_step(kit):
    model = kit.make_model(dtype=torch.float32)
    optimizer = kit.make_optimizer(model, rank_policy="relative_tail", schedule=Periodic(every=2))
    scaler = torch.amp.GradScaler("cpu", init_scale=8.0)
    events = []
    optimizer.on_rank_event(events.extend)
    scaled_step(kit, model, optimizer, scaler, 0)
    before = kit.snapshot(model, optimizer)
    optimizer.zero_grad()
    x, y = kit.batch(1, dtype=torch.float32)
    scaler.scale(1e38 * nn.functional.cross_entropy(model(1e3 * x), y)).backward()
    assert not all(torch.isfinite(p.grad).all() for p in model.parameters())
    scaler.step(optimizer)
    scaler.update()
    kit.assert_same(kit.snapshot(model, optimizer), before)
    assert optimizer.steps == 1 and events == [] and scaler.get_scale() == 4.0
    scaled_step(kit, model, optimizer, scaler, 2)
    assert optimizer.steps == 2 and len(events) == 2


def test_autocast_trains(kit):
    model = kit.make_model(dtype=torch.float32)
    optimizer = kit.make_optimizer(model, lr=0.1, rank_policy="relative_tail", schedule=Periodic(every=3))
    losses = []
    for step in range(30):
        optimizer.zero_grad()
        x, y = kit.batch(step, dtype=torch.float32)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            loss = nn.functional.cross_entropy(model(x), y)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert sum(losses[-5:]) < 0.7 * sum(losses[:5])


# --- other models ------------------------------------------------------------------------------------------------


def test_a_layer_that_took_no_part_is_left_alone(kit):
    model = kit.make_model()
    optimizer = kit.make_optimizer(model, weight_decay=0.1)
    kit.train(model, optimizer, range(2))
    before = weights(model)
    optimizer.zero_grad()
    model[2](torch.ones(3, 20, dtype=torch.float64)).square().sum().backward()
    state = {key: value.clone() for key, value in optimizer.state[model[0].A].items()}
    optimizer.step()
    assert torch.equal(model[0].weight.detach(), before["0.weight"])
    assert not torch.equal(model[2].weight.detach(), before["2.weight"])
    kit.assert_same(optimizer.state[model[0].A], state)
    assert torch.equal(model[4].weight.detach(), before["4.weight"])


def test_a_step_without_any_gradient_changes_nothing_but_the_count(kit):
    model = kit.make_model()
    optimizer = kit.make_optimizer(model)
    before = weights(model)
    optimizer.step()
    assert_close(weights(model), before, atol=0)
    assert optimizer.steps == 1


def test_a_model_of_factors_only_has_no_base_optimizer(kit):
    model = nn.Sequential(LowRankLinear(12, 8, rank=2, bias=False), nn.Tanh(), LowRankLinear(8, 4, rank=2, bias=False))
    model.double()
    optimizer = kit.make_optimizer(model)
    assert optimizer.base is None and len(optimizer.param_groups) == 1
    losses = kit.train(model, optimizer, range(40))
    assert sum(losses[-5:]) < 0.9 * sum(losses[:5])
    kit.make_optimizer(model).load_state_dict(optimizer.state_dict())


@pytest.mark.parametrize("sparse", [True, False])
def test_an_embedding_trains_with_the_base_optimizer(kit, sparse):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Embedding(10, 12, sparse=sparse), LowRankLinear(12, 10, rank=3)).double()
    optimizer = kit.make_optimizer(model)
    tokens = torch.tensor([1, 2, 2, 5])
    losses = []
    for _ in range(10):
        optimizer.zero_grad()
        loss = nn.functional.cross_entropy(model(tokens), tokens)
        loss.backward()
        assert model[0].weight.grad.is_sparse == sparse
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.9 * losses[0]
    model[0].weight.grad = model[0].weight.grad * torch.nan
    with pytest.raises(RuntimeError, match=r"0\.weight: gradient is not finite"):
        optimizer.step()


def test_a_failure_of_the_base_optimizer_moves_no_factor(kit):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Embedding(10, 12, sparse=True), LowRankLinear(12, 10, rank=3)).double()
    optimizer = kit.make_optimizer(model, base=torch.optim.AdamW, base_options={"lr": 0.1})
    before = kit.snapshot(model, optimizer)
    model(torch.tensor([1, 2])).square().sum().backward()
    with pytest.raises(RuntimeError, match="sparse"):
        optimizer.step()
    kit.assert_same(kit.snapshot(model, optimizer), before)


@pytest.mark.parametrize("options", [{}, {"fused": True}, {"foreach": True}])
@pytest.mark.parametrize("base", [torch.optim.AdamW, torch.optim.SGD])
def test_convolutions_and_norms_train(kit, base, options):
    model = kit.make_conv_model(dtype=torch.float32)
    ranks = {"rank_policy": "relative_tail", "schedule": Periodic(every=5)}
    optimizer = kit.make_optimizer(model, lr=0.1, base=base, base_options={"lr": 0.01} | options, **ranks)
    x, y = torch.randn(16, 2, 5, 5), torch.randint(0, 3, (16,))
    losses = []
    for _ in range(30):
        optimizer.zero_grad()
        loss = nn.functional.cross_entropy(model(x), y)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.5 * losses[0]
