"""Points, gradients of what a point stores, and dense projections, for the tests of all integrators."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from dynarank import factors
from dynarank.factors import FactorPair, LowRankFactors
from dynarank.integrators.base import Point


def draw(*shape: int, seed: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def random_pair(m: int, n: int, rank: int) -> FactorPair:
    U, V = (torch.linalg.qr(draw(size, rank, seed=size))[0] for size in (m, n))
    sigma = torch.logspace(0.3, -0.7, rank, dtype=torch.float64)
    return factors.to_pair(LowRankFactors(U, torch.diag(sigma), V))


def stored_gradient(point: Point, G: Tensor) -> FactorPair | Tensor:
    """What autograd gives the stored parameters where the dense gradient is ``G``."""
    if isinstance(point, FactorPair):
        return FactorPair(point.B @ G.mT, point.A @ G)
    return point.U.mT @ G @ point.V


def leading_bases(W: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    U, _, Vh = torch.linalg.svd(W)
    return U[:, :rank], Vh.mT[:, :rank]


def tangent_projection(W: Tensor, rank: int, Z: Tensor) -> Tensor:
    """``P(W) Z = U U^T Z + Z V V^T - U U^T Z V V^T``."""
    U, V = leading_bases(W, rank)
    return U @ U.mT @ Z + Z @ V @ V.mT - U @ U.mT @ Z @ V @ V.mT


@pytest.fixture
def make_pair() -> Callable[[int, int, int], FactorPair]:
    """A pair ``(m, n, rank)`` in the balanced gauge."""
    return random_pair


@pytest.fixture
def gradient_of() -> Callable[[Point, Tensor], FactorPair | Tensor]:
    """The gradient of what a point stores, from the dense one."""
    return stored_gradient


@pytest.fixture
def project() -> Callable[[Tensor, int, Tensor], Tensor]:
    """The dense projection on the tangent space at a matrix of the given rank."""
    return tangent_projection


@pytest.fixture
def bases_of() -> Callable[[Tensor, int], tuple[Tensor, Tensor]]:
    """The leading singular vectors of a dense matrix."""
    return leading_bases
