"""Noisy weights of planted rank, and the rank that a policy arrives at: on ideal spectra and in real training."""

import dataclasses
from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch.nn import functional

from dynarank import cost
from dynarank._discovery import discover
from dynarank.data.batches import Batches
from dynarank.data.synthetic import planted_teacher, planted_weight
from dynarank.factorize import factorize_
from dynarank.models.linear import LinearNetwork
from dynarank.optim.low_rank_optimizer import LowRankOptimizer
from dynarank.ranks.base import AbstractRankPolicy, LayerSpectrum, PlanContext
from dynarank.ranks.capped import Capped
from dynarank.ranks.hysteresis import Hysteresis
from dynarank.ranks.noise_edge import NoiseEdge
from dynarank.ranks.scheduled import Scheduled
from dynarank.schedules.periodic import Periodic

SAMPLES = 64  # per input feature, in the regression whose solution is the weight
EVENTS = 12

# Policies that follow another one obey a law if that one does.
FOLLOWERS = {
    "capped": Capped(NoiseEdge(), largest=0.9),
    "hysteresis": Hysteresis(NoiseEdge()),
    "scheduled": Scheduled(NoiseEdge(), option="factor", begin=1.0, end=0.4, over=200),
}


def build(name: str) -> AbstractRankPolicy:
    """Build a policy from its defaults; what has none is a fraction, and a half is in range."""
    cls = discover("dynarank.ranks", AbstractRankPolicy)[name]
    needed = [f.name for f in dataclasses.fields(cls) if f.default is f.default_factory is dataclasses.MISSING]
    return FOLLOWERS.get(name) or cls(**dict.fromkeys(needed, 0.5))


def noisy_weight(planted: int, noise: float, shape: tuple[int, int], *, seed: int = 0) -> Tensor:
    """What least squares finds for ``y = W x + noise`` with unit signal variance: ``W`` and noise of known level."""
    generator, (m, n) = torch.Generator().manual_seed(seed), shape
    W = planted_weight(planted, inputs=n, outputs=m, generator=generator)
    return W + noise / (SAMPLES * n) ** 0.5 * torch.randn(m, n, generator=generator, dtype=torch.float64)


def arrive(policy: AbstractRankPolicy, W: Tensor, *, start: int, step: int = 1000) -> int:
    """Return the rank after some events between which a layer is trained to the end: to the best ``W`` of its rank."""
    (m, n), sigma = W.shape, torch.linalg.svdvals(W)
    rank, seen = start, start
    for event in range(EVENTS):
        layer = LayerSpectrum("layer", sigma[:seen], (m, n), kept=rank)
        decision = policy.plan([layer], PlanContext(step + 25 * event, cost.dense_parameters(m, n), 0))[0]
        rank, seen = decision.rank, decision.rank + decision.candidates
    return rank


def train(policy: AbstractRankPolicy, planted: int, noise: float, *, start: int, seed: int = 0) -> int:
    """Return the rank of a linear layer 64 -> 48 after training with the optimizer's defaults, ranks frozen."""
    splits = planted_teacher(planted, noise=noise, seed=seed).splits
    torch.manual_seed(seed)
    model = LinearNetwork(64, 48)
    factorize_(model, rank=start, include_head=True, keep_dense_above_break_even=False)
    batches = Batches(splits.train_inputs, splits.train_targets, 128, torch.Generator().manual_seed(seed))
    optimizer = LowRankOptimizer(model, lr=0.05, rank_policy=policy, schedule=Periodic(every=25, freeze=300))
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 600)
    for _ in range(300):
        inputs, targets = batches.next_batch()
        optimizer.zero_grad()
        functional.mse_loss(model(inputs), targets).backward()
        optimizer.step()
        scheduler.step()
    return model.fc.rank  # type: ignore[return-value]


@pytest.fixture
def policy_of() -> Callable[[str], AbstractRankPolicy]:
    """A policy by its name, ready for a law."""
    return build


@pytest.fixture
def weight_of() -> Callable[..., Tensor]:
    """A weight of planted rank under noise."""
    return noisy_weight


@pytest.fixture
def arrives_at() -> Callable[..., int]:
    """The rank that a policy arrives at on ideal spectra."""
    return arrive


@pytest.fixture
def trains_to() -> Callable[..., int]:
    """The rank that a policy arrives at in training."""
    return train
