"""One step of each integrator with two gradients, as its paper writes it, on dense matrices."""

from typing import Any

import pytest
import torch
from torch import Tensor

from dynarank.integrators.abc_psi import AbcPSI
from dynarank.integrators.base import AbstractClosureIntegrator, Point
from dynarank.integrators.rank_adaptive_bug import RankAdaptiveBUG
from dynarank.integrators.unconventional_bug import UnconventionalBUG

SIZES = [(7, 5, 1), (5, 7, 1), (7, 5, 2), (5, 7, 3), (7, 5, 4), (5, 7, 5), (6, 6, 6)]
LR = 0.3


class Problem:
    """The loss ``|W - T|^2 / 2 + sum W^4 / 4``, whose gradient differs from point to point."""

    def __init__(self, target: Tensor, gradient_of: Any) -> None:
        self.target, self.gradient_of = target, gradient_of
        self.asked: list[Tensor] = []

    def slope(self, W: Tensor) -> Tensor:
        return W - self.target + W**3

    def step(self, integrator: AbstractClosureIntegrator, point: Point) -> Point:
        """Run the stages and keep the weights at which gradients were asked for."""
        given = self.gradient_of(point, self.slope(point.to_dense()))
        stages = integrator.stages(point, given, {}, lr=LR, momentum=0.9, trusted=True)
        try:
            wanted = next(stages)
            while True:
                self.asked.append(wanted.to_dense())
                wanted = stages.send(self.gradient_of(wanted, self.slope(self.asked[-1])))
        except StopIteration as end:
            return end.value[0]


@pytest.fixture(params=SIZES, ids=lambda size: "{}x{} rank {}".format(*size))
def size(request: pytest.FixtureRequest) -> tuple[int, int, int]:
    return request.param


@pytest.fixture
def problem(size: tuple[int, int, int], gradient_of: Any) -> Problem:
    generator = torch.Generator().manual_seed(3)
    return Problem(torch.randn(size[:2], generator=generator, dtype=torch.float64), gradient_of)


def basis(*columns: Tensor) -> Tensor:
    """An orthonormal basis of the span."""
    U, sigma, _ = torch.linalg.svd(torch.cat(columns, 1), full_matrices=False)
    return U[:, sigma > 1e-9 * sigma[0]]


def assert_near(found: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(found, expected, atol=1e-12, rtol=0)


def test_unconventional_bug(make_pair, bases_of, problem, size):
    point = make_pair(*size)
    W0, (U0, V0) = point.to_dense(), bases_of(point.to_dense(), size[2])
    G0 = problem.slope(W0)
    U1 = basis((W0 - LR * G0) @ V0)
    V1 = basis((W0 - LR * G0).mT @ U0)
    projected = U1 @ U1.mT @ W0 @ V1 @ V1.mT
    expected = projected - LR * U1 @ U1.mT @ problem.slope(projected) @ V1 @ V1.mT
    assert_near(problem.step(UnconventionalBUG(), point).to_dense(), expected)
    assert len(problem.asked) == 1
    assert_near(problem.asked[0], projected)


def test_rank_adaptive_bug(make_pair, bases_of, problem, size):
    point = make_pair(*size)
    W0, (U0, V0) = point.to_dense(), bases_of(point.to_dense(), size[2])
    G0 = problem.slope(W0)
    U1, V1 = basis(U0, G0 @ V0), basis(V0, G0.mT @ U0)
    found = problem.step(RankAdaptiveBUG(), point)
    assert_near(found.to_dense(), W0 - LR * U1 @ U1.mT @ G0 @ V1 @ V1.mT)
    assert_near(problem.asked[0], W0)
    assert found.rank == min(2 * size[2], *size[:2])


def test_abc_psi(make_pair, bases_of, problem, size):
    point = make_pair(*size)
    W0, (U0, V0) = point.to_dense(), bases_of(point.to_dense(), size[2])
    G0 = problem.slope(W0)
    U1 = basis(U0, W0 @ V0 - LR * G0 @ V0)
    found = problem.step(AbcPSI(), point)
    assert_near(found.to_dense(), W0 - LR * U1 @ U1.mT @ G0)
    assert_near(problem.asked[0], W0)
    assert found.rank == min(2 * size[2], *size[:2])
    for basis_ in (found.U, found.V):
        assert_near(basis_.mT @ basis_, torch.eye(basis_.shape[1]).double())


@pytest.mark.parametrize("integrator", [UnconventionalBUG(), RankAdaptiveBUG(), AbcPSI()])
def test_one_gradient_alone_is_refused(make_pair, gradient_of, integrator):
    point = make_pair(7, 5, 2)
    slope = gradient_of(point, point.to_dense())
    with pytest.raises(TypeError, match="takes 2 gradients a step"):
        integrator.advance(point, slope, {}, lr=0.1, momentum=0.0, trusted=True)
