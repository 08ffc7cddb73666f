"""The trajectory of the weights does not depend on how the start is split into factors: the gauge law."""

from typing import Any

import pytest
import torch
from torch import Tensor

from dynarank import factors
from dynarank.factors import FactorPair, LowRankFactors
from dynarank.integrators.base import AbstractIntegrator, Point
from dynarank.integrators.lora_muon import LoRAMuon
from dynarank.integrators.parallel_bug import ParallelBUG
from dynarank.integrators.riemannian_gradient import RiemannianGradient
from dynarank.integrators.tangent_adam import TangentAdam
from dynarank.integrators.tangent_heavy_ball import TangentHeavyBall
from dynarank.integrators.tangent_muon import TangentMuon

INVARIANT = {
    LoRAMuon: 0.01,
    ParallelBUG: 0.1,
    RiemannianGradient: 0.02,
    TangentAdam: 0.01,
    TangentHeavyBall: 0.02,
    TangentMuon: 0.01,
}
INPUTS, HIDDEN, OUTPUTS, RANKS = 6, 9, 5, (4, 3)
CONDITION = 1e3


def draw(*shape: int, seed: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def start(dtype: torch.dtype) -> list[FactorPair]:
    """Two low-rank layers: ``(9, 6)`` of rank 4 and ``(5, 9)`` of rank 3."""
    weights = (draw(HIDDEN, INPUTS, seed=1) / INPUTS**0.5, draw(OUTPUTS, HIDDEN, seed=2) / HIDDEN**0.5)
    pairs = [factors.to_pair(factors.from_dense(W, rank=r)) for W, r in zip(weights, RANKS, strict=True)]
    return [FactorPair(pair.A.to(dtype), pair.B.to(dtype)) for pair in pairs]


def regauged(pair: FactorPair, kind: str, seed: int) -> FactorPair:
    """``C^T A`` and ``C^-1 B`` for a rotation, or for any invertible ``C`` of condition 1e3."""
    C, other = (torch.linalg.qr(draw(pair.rank, pair.rank, seed=s))[0] for s in (seed, seed + 1))
    if kind == "any gauge":
        C = C @ torch.diag(CONDITION ** torch.linspace(-0.5, 0.5, pair.rank, dtype=torch.float64)) @ other
    A, B = C.mT @ pair.A.double(), torch.linalg.solve(C, pair.B.double())
    return FactorPair(A.to(pair.A.dtype), B.to(pair.B.dtype))


def loss(weights: list[Tensor]) -> Tensor:
    x, y = draw(40, INPUTS, seed=3).to(weights[0].dtype), draw(40, OUTPUTS, seed=4).to(weights[0].dtype)
    return (torch.tanh(x @ weights[0].mT) @ weights[1].mT - y.tanh()).square().mean() * OUTPUTS


def train(
    method: AbstractIntegrator, points: list[Any], gradient_of: Any, *, lr: float, steps: int = 100
) -> tuple[list[Tensor], float]:
    """Return the weights after some steps, and the loss before them as a multiple of that after."""
    states, trusted, losses = [method.init(point) for point in points], False, []
    for _ in range(steps):
        weights = [point.to_dense().requires_grad_() for point in points]
        value = loss(weights)
        value.backward()
        losses.append(float(value.detach()))
        moves = [
            method.advance(p, gradient_of(p, W.grad), s, lr=lr, momentum=0.9, trusted=trusted)
            for p, W, s in zip(points, weights, states, strict=True)
        ]
        points, states, trusted = [p for p, _ in moves], [s for _, s in moves], True
    return [point.to_dense() for point in points], losses[0] / losses[-1]


@pytest.mark.parametrize("method", INVARIANT, ids=lambda method: method.__name__)
@pytest.mark.parametrize("kind", ["rotation", "any gauge"])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-10), (torch.float32, 1e-3)], ids=str)
def test_a_hundred_steps_do_not_depend_on_the_gauge(method, kind, dtype, tolerance, gradient_of):
    points, lr = start(dtype), INVARIANT[method]
    others = [regauged(pair, kind, seed=10 * i) for i, pair in enumerate(points)]
    found, gain = train(method(), points, gradient_of, lr=lr)
    turned, _ = train(method(), others, gradient_of, lr=lr)
    assert gain > 1.2, "the test says nothing about a method that does not train"
    for one, other in zip(found, turned, strict=True):
        assert float((one - other).norm() / one.norm()) < tolerance


@pytest.mark.parametrize("method", [m for m in INVARIANT if m is not ParallelBUG], ids=lambda method: method.__name__)
def test_a_turn_of_the_bases_changes_nothing_in_the_next_step(method, gradient_of):
    U, V = (torch.linalg.qr(draw(size, 3, seed=size))[0] for size in (7, 5))
    here: Point = factors.to_pair(LowRankFactors(U, torch.eye(3, dtype=torch.float64), V))
    W, Q = here.to_dense(), torch.linalg.qr(draw(3, 3, seed=8))[0]
    there = FactorPair(Q @ here.A, Q @ here.B)  # with equal singular values every rotation is in the gauge
    fresh = method().init(here)
    state = method().advance(here, gradient_of(here, draw(7, 5, seed=9)), fresh, lr=0.0, momentum=0.9, trusted=True)
    state = method().transport(state[1], state[0], here)
    carried = method().transport(state, here, there)
    ends = [
        method().advance(point, gradient_of(point, W), known, lr=0.05, momentum=0.9, trusted=True)[0].to_dense()
        for point, known in ((here, state), (there, carried), (here, fresh))
    ]
    torch.testing.assert_close(ends[1], ends[0], atol=1e-12, rtol=0)
    assert float((ends[2] - ends[0]).norm()) > 1e-3, "the momentum has no part in this step"
