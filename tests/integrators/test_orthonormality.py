"""Bases stay orthonormal in float32 over thousands of noisy steps and rank events."""

from typing import Any

import pytest
import torch
from torch import Tensor

from dynarank import factors, linalg
from dynarank._discovery import discover
from dynarank.factors import FactorPair, LowRankFactors
from dynarank.integrators import _tangent
from dynarank.integrators.base import AbstractIntegrator, Point, State

KEEPING = {name: cls for name, cls in discover("dynarank.integrators", AbstractIntegrator).items() if cls.keeps_gauge}
M, N, RANK, LR = 40, 30, 8, 0.05


def draw(generator: torch.Generator, *shape: int) -> Tensor:
    return torch.randn(shape, generator=generator)


def spectrum_pair(generator: torch.Generator) -> FactorPair:
    """A float32 pair whose singular values fall from 1 to 1e-6."""
    U, V = (torch.linalg.qr(draw(generator, size, RANK))[0] for size in (M, N))
    return factors.to_pair(LowRankFactors(U, torch.diag(torch.logspace(0, -6, RANK)), V))


def change_rank(
    integrator: AbstractIntegrator, point: Point, state: State, count: int, generator: torch.Generator
) -> tuple[FactorPair, State]:
    """Cut to half the rank, or grow to the full one: what a rank event does."""
    at = factors.read_balanced(point) if isinstance(point, FactorPair) else factors.diagonalise(point)
    kept = factors.truncate(at, rank=RANK // 2 if count % 2 else min(RANK, at.rank))
    if kept.rank < RANK:
        ways = integrator.directions(state, point) if state else None
        left, right = ways or (draw(generator, M, RANK), draw(generator, N, RANK))
        grown = RANK - kept.rank if count % 2 == 0 else 1
        left, right = linalg.complement(kept.U, left, grown), linalg.complement(kept.V, right, grown)
        kept = factors.augment(kept, left=left, right=right)
    new = factors.to_pair(kept)
    return new, integrator.transport(state, point, new)


def drift(point: Point) -> float:
    at = factors.read_balanced(point) if isinstance(point, FactorPair) else point
    return max(float((b.mT @ b - torch.eye(b.shape[1])).abs().max()) for b in (at.U, at.V))


def check_drift(name: str, gradient_of: Any, steps: int) -> None:
    generator = torch.Generator().manual_seed(3)
    integrator, point = KEEPING[name](), spectrum_pair(generator)
    state, worst = integrator.init(point), 0.0
    target = spectrum_pair(generator).to_dense()
    for step in range(1, steps + 1):
        noise = draw(generator, M, N)
        slope = lambda at, noise=noise: gradient_of(at, at.to_dense() - target + 0.3 * noise)  # noqa: E731
        point, state = integrator.step(point, slope, state, lr=LR, momentum=0.9, trusted=True)
        if step % 25 == 0:
            point, state = change_rank(integrator, point, state, step // 25, generator)
        worst = max(worst, drift(point))
    assert worst < 1e-5
    assert bool(torch.isfinite(point.to_dense()).all())


@pytest.mark.parametrize("name", KEEPING)
def test_bases_stay_orthonormal_for_hundreds_of_steps(name: str, gradient_of: Any):
    check_drift(name, gradient_of, 300)


@pytest.mark.parametrize("name", [name for name in KEEPING if name.startswith("tangent")])
def test_bases_from_gram_matrices_stay_orthonormal(name: str, gradient_of: Any, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(_tangent, "LARGE", 1)
    check_drift(name, gradient_of, 2_000)


@pytest.mark.slow
@pytest.mark.parametrize("name", KEEPING)
def test_bases_stay_orthonormal_for_ten_thousand_steps(name: str, gradient_of: Any):
    check_drift(name, gradient_of, 10_000)
