"""Rows beyond the rank are zero and stay exactly zero under torch's own optimizers, with no mask."""

from collections.abc import Callable, Iterable
from typing import Any

import pytest
import torch
from torch import nn, optim

from dynarank.layers.conv2d import LowRankConv2d
from dynarank.layers.linear import LowRankLinear

Build = Callable[[Iterable[nn.Parameter]], optim.Optimizer]

OPTIMIZERS: dict[str, Build] = {
    "sgd": lambda p: optim.SGD(p, lr=0.05, momentum=0.9, weight_decay=0.01),
    "sgd-nesterov": lambda p: optim.SGD(p, lr=0.05, momentum=0.9, nesterov=True),
    "adam": lambda p: optim.Adam(p, lr=0.05, weight_decay=0.01, amsgrad=True),
    "adamw": lambda p: optim.AdamW(p, lr=0.05, weight_decay=0.1),
    "adamw-fused": lambda p: optim.AdamW(p, lr=0.05, weight_decay=0.1, fused=True),
    "adamw-foreach": lambda p: optim.AdamW(p, lr=0.05, weight_decay=0.1, foreach=True),
    "rmsprop": lambda p: optim.RMSprop(p, lr=0.01, momentum=0.9, centered=True),
    "adagrad": lambda p: optim.Adagrad(p, lr=0.05, lr_decay=0.01),
    "adadelta": lambda p: optim.Adadelta(p, lr=1.0, weight_decay=0.01),
    "nadam": lambda p: optim.NAdam(p, lr=0.05),
    "radam": lambda p: optim.RAdam(p, lr=0.05),
    "adamax": lambda p: optim.Adamax(p, lr=0.05),
    "adafactor": lambda p: optim.Adafactor(p, lr=0.05, weight_decay=0.01),
    "rprop": lambda p: optim.Rprop(p, lr=0.01),
    "asgd": lambda p: optim.ASGD(p, lr=0.05),
}


def train(model: nn.Module, optimizer: optim.Optimizer, steps: int = 8) -> None:
    for _ in range(steps):
        optimizer.zero_grad()
        y = model(torch.randn(4, 2, 6, 6))
        (y - 1).square().mean().backward()
        optimizer.step()


def network() -> Any:
    return nn.Sequential(
        LowRankConv2d(2, 9, 3, rank=3, rank_multiple=8),
        nn.ReLU(),
        nn.Flatten(),
        LowRankLinear(144, 20, rank=2, rank_multiple=8),
    )


@pytest.mark.parametrize("build", OPTIMIZERS.values(), ids=OPTIMIZERS.keys())
def test_spare_rows_stay_exactly_zero(build: Build):
    model = network()
    before = [p.detach().clone() for p in model.parameters()]
    train(model, build(model.parameters()))
    for layer in (model[0], model[3]):
        assert (layer.capacity, layer.rank) in ((8, 3), (8, 2))
        for factor in (layer.A, layer.B):
            assert factor[: layer.rank].any(dim=1).all() and torch.isfinite(factor).all()
            assert torch.equal(factor[layer.rank :], torch.zeros_like(factor[layer.rank :]))
    assert all(not torch.equal(old, new) for old, new in zip(before, model.parameters(), strict=True))


@pytest.mark.skipif(not hasattr(optim, "Muon"), reason="this torch has no Muon")
def test_spare_rows_stay_exactly_zero_under_muon():
    model = network()
    matrices = [p for p in model.parameters() if p.dim() == 2]
    train(model, optim.Muon(matrices, lr=0.02, weight_decay=0.1))
    for layer in (model[0], model[3]):
        for factor in (layer.A, layer.B):
            assert torch.equal(factor[layer.rank :], torch.zeros_like(factor[layer.rank :]))


def test_training_with_spare_rows_is_training_without():
    torch.manual_seed(1)
    exact = nn.Sequential(LowRankLinear(6, 9, rank=3, dtype=torch.float64))
    roomy = nn.Sequential(LowRankLinear(6, 9, rank=3, rank_multiple=6, dtype=torch.float64))
    roomy[0].set_factors(exact[0].point(), resize=False)
    with torch.no_grad():
        roomy[0].bias.copy_(exact[0].bias)
    assert roomy[0].capacity == 6
    x = torch.randn(10, 8, 6, dtype=torch.float64)
    for model in (exact, roomy):
        optimizer = optim.AdamW(model.parameters(), lr=0.01)
        for batch in x:
            optimizer.zero_grad()
            (model(batch) - 1).square().mean().backward()
            optimizer.step()
    torch.testing.assert_close(roomy[0].A[:3], exact[0].A, atol=1e-12, rtol=1e-12)
    torch.testing.assert_close(roomy[0].B[:3], exact[0].B, atol=1e-12, rtol=1e-12)
