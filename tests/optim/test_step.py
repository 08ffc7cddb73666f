"""One step against dense matrices: weight decay on W, factors that others changed, factors that lost a direction."""

from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from dynarank import factors
from dynarank._discovery import discover
from dynarank.integrators.base import AbstractIntegrator
from dynarank.layers.linear import LowRankLinear

INTEGRATORS = sorted(discover("dynarank.integrators", AbstractIntegrator))
GAUGED = [n for n, cls in discover("dynarank.integrators", AbstractIntegrator).items() if cls.keeps_gauge]  # type: ignore[attr-defined]
LR = 0.1


def set_gradient(layer: LowRankLinear, G: Tensor) -> None:
    """Give the stored factors the gradients that a loss with the dense gradient ``G`` has."""
    if layer.form == "core":
        layer.S.grad = layer.U.mT @ G @ layer.V
    else:
        layer.A.grad, layer.B.grad = (layer.B @ G.mT).detach(), (layer.A @ G).detach()


def drawn(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(3), dtype=torch.float64)


def alone(kit: Any, *, m: int = 9, n: int = 7, rank: int = 3, **options: Any) -> tuple[LowRankLinear, Any]:
    torch.manual_seed(0)
    layer = LowRankLinear(n, m, rank=rank, bias=False).double()
    return layer, kit.make_optimizer(layer, lr=LR, **options)


def weight(layer: LowRankLinear) -> Tensor:
    return layer.weight.detach().as_subclass(Tensor).clone()


def project(W: Tensor, rank: int, G: Tensor) -> Tensor:
    """``P(W) G = U U^T G + G V V^T - U U^T G V V^T``."""
    U, _, Vh = torch.linalg.svd(W)
    P, Q = U[:, :rank] @ U[:, :rank].mT, Vh[:rank].mT @ Vh[:rank]
    return P @ G + G @ Q - P @ G @ Q


def best(W: Tensor, rank: int) -> Tensor:
    U, sigma, Vh = torch.linalg.svd(W)
    return U[:, :rank] @ torch.diag(sigma[:rank]) @ Vh[:rank]


def clear(model: nn.Module) -> None:
    """Give every parameter a gradient of zero."""
    for p in model.parameters():
        p.grad = torch.zeros_like(p)


# --- weight decay ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("integrator", INTEGRATORS)
def test_without_gradient_a_step_multiplies_the_weight_and_nothing_else(kit, integrator):
    model = kit.make_model()
    optimizer = kit.make_optimizer(model, lr=LR, weight_decay=0.3, integrator=integrator)
    rest = {n: p.detach().clone() for n, p in model.named_parameters() if n.split(".")[1] not in "ABS"}
    for _ in range(3):
        before = {name: layer.weight.detach() for name, layer in optimizer.layers.items()}
        kit.take_step(optimizer, partial(clear, model))
        for name, layer in optimizer.layers.items():
            expected = (1 - LR * 0.3) * before[name]
            error = (layer.weight - expected).norm() / expected.norm()
            assert error < 1e-14 * 5, (name, error)
    assert all(torch.equal(p, rest[n]) for n, p in model.named_parameters() if n in rest)


def test_decay_follows_the_step_along_the_gradient_of_the_undecayed_weight(kit):
    layer, optimizer = alone(kit, integrator="parallel_bug", weight_decay=0.5)
    W, G = weight(layer), drawn(9, 7)
    set_gradient(layer, G)
    optimizer.step()
    expected = (1 - LR * 0.5) * best(W - LR * project(W, 3, G), 3)
    torch.testing.assert_close(weight(layer), expected, atol=1e-13, rtol=0)


@pytest.mark.parametrize("integrator", ["tangent_muon", "gauge_fixed"])
def test_a_decay_that_would_turn_the_weight_around_is_refused(kit, integrator):
    layer, optimizer = alone(kit, weight_decay=20.0, integrator=integrator)
    set_gradient(layer, drawn(9, 7))
    before = kit.snapshot(layer, optimizer)
    with pytest.raises(ValueError, match="lower the decay"):
        optimizer.step()
    kit.assert_same(kit.snapshot(layer, optimizer), before)


# --- factors that others changed ---------------------------------------------------------------------------------


def plain_step(layer: LowRankLinear) -> None:
    torch.optim.SGD(layer.parameters(), lr=0.5).step()


def fused_step(layer: LowRankLinear) -> None:
    torch.optim.AdamW(layer.parameters(), lr=0.1, fused=True).step()


def load(layer: LowRankLinear) -> None:
    layer.load_state_dict({"A": drawn(3, 9), "B": drawn(3, 7) + 1})


def edit(layer: LowRankLinear) -> None:
    with torch.no_grad():
        layer.A.mul_(torch.tensor([[3.0], [1.0], [0.1]], dtype=torch.float64))
        layer.B[0] += layer.B[1]


def edit_data(layer: LowRankLinear) -> None:
    layer.A.data[0] += 0.5 * layer.A.data[1]


def replace_data(layer: LowRankLinear) -> None:
    layer.A.data = drawn(3, 9)


def assign(layer: LowRankLinear) -> None:
    layer.A, layer.B = nn.Parameter(drawn(3, 9)), nn.Parameter(drawn(3, 7))


def set_weight(layer: LowRankLinear) -> None:
    layer.set_weight_(drawn(9, 7))


CHANGES = [plain_step, fused_step, load, edit, edit_data, replace_data, assign, set_weight]


@pytest.mark.parametrize("change", CHANGES)
def test_after_a_foreign_change_the_step_is_the_dense_tangent_step(kit, change):
    layer, optimizer = alone(kit, integrator="parallel_bug")
    for seed in range(2):
        set_gradient(layer, drawn(9, 7) * seed)
        optimizer.step()
    change(layer)
    W, G = weight(layer), drawn(9, 7).flip(0)
    set_gradient(layer, G)
    optimizer.step()
    torch.testing.assert_close(weight(layer), best(W - LR * project(W, 3, G), 3), atol=1e-12, rtol=0)


@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("integrator", INTEGRATORS)
def test_after_a_foreign_change_the_step_is_the_first_step_of_a_new_optimizer(kit, integrator, change):
    layer, optimizer = alone(kit, integrator=integrator)
    kit.take_step(optimizer, lambda: set_gradient(layer, drawn(9, 7)))
    if layer.form == "core":  # the changes are made to a layer in the pair form
        layer.set_factors(factors.from_dense(weight(layer), rank=3), form="pair")
    set_gradient(layer, drawn(9, 7))  # what the changes step along
    change(layer)
    layer.zero_grad()
    twin, _ = alone(kit)
    twin.load_state_dict(layer.state_dict())
    fresh = kit.make_optimizer(twin, lr=LR, integrator=integrator)
    for each, driver in ((layer, optimizer), (twin, fresh)):
        kit.take_step(driver, partial(set_gradient, each, drawn(9, 7).flip(1)))
    kit.assert_same(layer.state_dict(), twin.state_dict())
    kit.assert_same(optimizer.state_dict()["state"], fresh.state_dict()["state"])


def test_foreign_changes_are_told_once(kit, caplog):
    model = kit.make_model()
    optimizer = kit.make_optimizer(model)
    for _ in range(3):
        kit.train(model, optimizer, range(2))
        torch.optim.SGD([model[2].A], lr=0.1).step()
    assert caplog.text.count("the factors are not as step") == 1 and "2: the factors are not as step 2" in caplog.text


def test_copying_the_same_values_back_breaks_no_seal(kit, caplog):
    """As averages of weights do that are swapped in for an evaluation and out again."""
    runs = []
    for swap in (False, True):
        model = kit.make_model()
        optimizer = kit.make_optimizer(model)
        kit.train(model, optimizer, range(2))
        if swap:
            kept = [p.data.clone() for p in model.parameters()]
            for p in model.parameters():
                p.data.copy_(torch.zeros_like(p))
            for p, values in zip(model.parameters(), kept, strict=True):
                p.data.copy_(values)
        runs.append((kit.train(model, optimizer, range(2, 5)), model.state_dict()))
    kit.assert_same(*runs)
    assert caplog.text == ""


def test_another_number_of_threads_breaks_no_seal(kit):
    layer, optimizer = alone(kit)
    set_gradient(layer, drawn(9, 7))
    optimizer.step()
    torch.set_num_threads(2)
    try:
        assert optimizer.look("", layer)[1]
        with torch.no_grad():
            layer.A.data.mul_(1.01)
        assert optimizer.look("", layer)[1] is None
    finally:
        torch.set_num_threads(1)


def test_an_emptied_state_starts_afresh(kit):
    layer, optimizer = alone(kit)
    set_gradient(layer, drawn(9, 7))
    optimizer.step()
    optimizer.state.clear()
    set_gradient(layer, drawn(9, 7))
    optimizer.step()
    assert torch.isfinite(layer.A).all()


def test_bases_of_the_core_form_are_watched_too(kit):
    layer, optimizer = alone(kit, integrator="augmented_bug")
    set_gradient(layer, drawn(9, 7))
    optimizer.step()
    assert layer.form == "core" and optimizer.look("", layer)[1]
    with torch.no_grad():
        layer.U.neg_()
    assert optimizer.look("", layer)[1] is None


# --- factors that lost a direction -------------------------------------------------------------------------------


def zero_row(layer: LowRankLinear) -> None:
    layer.A[1] = 0


def zero_row_in_both(layer: LowRankLinear) -> None:
    layer.A[1] = layer.B[1] = 0


def equal_rows(layer: LowRankLinear) -> None:
    layer.B[2] = 2 * layer.B[0]


def zero_factor(layer: LowRankLinear) -> None:
    layer.A.zero_()


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("lose", [zero_row, zero_row_in_both, equal_rows, zero_factor])
@pytest.mark.parametrize("integrator", GAUGED)
def test_a_lost_direction_comes_back_and_the_layer_sits_out_one_step(kit, caplog, integrator, lose, dtype):
    layer, _ = alone(kit)
    layer.to(dtype)
    optimizer = kit.make_optimizer(layer, lr=LR, integrator=integrator)
    with torch.no_grad():
        lose(layer)
    W = weight(layer).double()
    kit.take_step(optimizer, lambda: set_gradient(layer, drawn(9, 7).to(dtype)))
    assert "a factor had lost a direction; it gets fresh ones and sits out step 1" in caplog.text
    scale = max(W.norm().item(), 1.0)
    torch.testing.assert_close(
        weight(layer).double(), W, atol=scale * (1e-2 if dtype == torch.bfloat16 else 1e-6), rtol=0
    )
    for _ in range(40):  # training lifts the fresh directions
        kit.take_step(optimizer, lambda: set_gradient(layer, (weight(layer).double() - drawn(9, 7)).to(dtype)))
    assert torch.isfinite(weight(layer)).all()
    if dtype == torch.float64 and layer.form == "pair":
        assert torch.linalg.svdvals(weight(layer))[2] > 1e-3


def test_plain_factors_may_start_at_zero_as_adapters_do(kit, caplog):
    layer, optimizer = alone(kit, integrator="plain_factors")
    with torch.no_grad():
        layer.A.zero_()
    set_gradient(layer, drawn(9, 7))
    step = -LR * (1 + 0.9) * layer.A.grad
    optimizer.step()
    torch.testing.assert_close(layer.A.detach(), step, atol=1e-14, rtol=0)
    assert caplog.text == ""
