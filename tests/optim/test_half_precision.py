"""Layers in half precision: the optimizer works on float32 masters, the layer holds them rounded."""

from dataclasses import fields
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from dynarank._discovery import discover
from dynarank.factors import FactorPair
from dynarank.integrators.base import AbstractIntegrator
from dynarank.layers.linear import LowRankLinear
from dynarank.ranks.relative_tail import RelativeTail
from dynarank.schedules.periodic import Periodic

INTEGRATORS = sorted(discover("dynarank.integrators", AbstractIntegrator))
RATES = {"tangent_muon": 0.03, "gauge_fixed_muon": 0.04, "conditioned": 0.02, "tangent_adam_elementwise": 0.03}


def regression() -> tuple[Tensor, Tensor]:
    """Inputs ``(64, 24)`` and the outputs of a map of rank 3."""
    generator = torch.Generator().manual_seed(5)
    x, left, right = (torch.randn(s, generator=generator) for s in ((64, 24), (24, 3), (3, 16)))
    return x, x @ left @ right / 24**0.5


def run(kit: Any, dtype: torch.dtype, *, steps: int = 200, **options: Any) -> tuple[list[float], LowRankLinear, Any]:
    torch.manual_seed(1)
    model = nn.Sequential(LowRankLinear(24, 16, rank=4, bias=False)).to(dtype)
    optimizer = kit.make_optimizer(model, **options)
    x, y = regression()

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = (model(x.to(dtype)).float() - y).square().mean()
        loss.backward()
        return loss

    losses = [kit.take_step(optimizer, closure).item() for _ in range(steps)]
    return losses, model[0], optimizer


@pytest.mark.parametrize("integrator", INTEGRATORS)
def test_two_hundred_steps_in_bfloat16_track_float32(kit, integrator):
    options = {"integrator": integrator, "lr": RATES.get(integrator, 0.1)}
    wide, reference, _ = run(kit, torch.float32, **options)
    half, layer, _ = run(kit, torch.bfloat16, **options)
    assert layer.weight.dtype == torch.bfloat16
    assert wide[-1] < 0.15 * wide[0]
    for a, b in zip(wide[::20], half[::20], strict=True):
        assert abs(a - b) < 0.01 * wide[0], (a, b)
    distance = (layer.weight.float() - reference.weight).norm() / reference.weight.norm()
    assert distance < 0.03


def test_steps_below_the_resolution_of_the_weights_add_up(kit):
    """A step changes ``W`` by a tenth of what bfloat16 resolves; without masters nothing would ever move."""
    torch.manual_seed(0)
    layer = LowRankLinear(24, 16, rank=4, bias=False).bfloat16()
    optimizer = kit.make_optimizer(layer, lr=1.0, integrator="tangent_heavy_ball", momentum=0.0)
    W = layer.weight.detach().float().as_subclass(Tensor)
    U, _, Vh = torch.linalg.svd(W)
    direction = U[:, :1] @ Vh[:1]  # along the leading direction, so that the bases stay
    step = 4e-4 * torch.linalg.svdvals(W)[0].item()
    for _ in range(100):
        G = step * direction
        layer.A.grad, layer.B.grad = (layer.B.float() @ G.mT).bfloat16(), (layer.A.float() @ G).bfloat16()
        optimizer.step()
    moved = (W - layer.weight.detach().float().as_subclass(Tensor)) * direction
    assert moved.sum().item() == pytest.approx(100 * step, rel=0.05)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("integrator", INTEGRATORS)
def test_the_layer_holds_the_masters_rounded(kit, integrator, dtype):
    policy, schedule = RelativeTail(0.3), Periodic(every=3)
    _, layer, optimizer = run(kit, dtype, steps=8, integrator=integrator, rank_policy=policy, schedule=schedule)
    point, state = optimizer.look("0", layer)
    assert state is not None and all(value.dtype in (torch.float32, torch.int64) for value in state.values())
    for field in fields(point):
        master = getattr(point, field.name)
        assert master.dtype == torch.float32
        assert torch.equal(getattr(layer, field.name)[: len(master)], master.to(dtype))


def test_a_foreign_change_replaces_the_masters(kit):
    _, layer, optimizer = run(kit, torch.bfloat16, steps=3)
    with torch.no_grad():
        layer.A.mul_(2)
    point, state = optimizer.look("0", layer)
    assert isinstance(point, FactorPair) and state is None and torch.equal(point.A, layer.A)
    for p in layer.parameters():
        p.grad = torch.zeros_like(p)
    W = layer.weight.detach().float()
    optimizer.step()
    torch.testing.assert_close(layer.weight.detach().float(), W, atol=2e-2, rtol=2e-2)
    assert optimizer.look("0", layer)[0].A.dtype == torch.float32


def test_a_model_cast_after_training_started_is_read_afresh(kit):
    _, layer, optimizer = run(kit, torch.float32, steps=3)
    layer.bfloat16()
    assert optimizer.look("0", layer)[1] is None
    layer.A.grad, layer.B.grad = torch.zeros_like(layer.A), torch.zeros_like(layer.B)
    optimizer.step()
    assert optimizer.look("0", layer)[0].A.dtype == torch.float32
