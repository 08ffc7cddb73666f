"""What an integrator reads from gradients under leading directions is the projection at the truncated weight."""

from typing import Any

import pytest
import torch
from torch import Tensor

from dynarank.integrators._tangent import project_gradient
from dynarank.integrators.base import read, read_gradient
from dynarank.layers.linear import LowRankLinear


def draw(*shape: int, seed: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def projected(G: Tensor, W: Tensor, rank: int) -> Tensor:
    """The gradient on the tangent space of matrices of a rank, at the truncated SVD of ``W``."""
    U, _, Vh = torch.linalg.svd(W)
    left, right = U[:, :rank] @ U[:, :rank].mT, Vh[:rank].mT @ Vh[:rank]
    return left @ G + G @ right - left @ G @ right


@pytest.mark.parametrize(("m", "n"), [(9, 7), (7, 9)])
@pytest.mark.parametrize("ranks", [(1,), (3,), (5,), (5, 2), (4, 3, 1)])
@pytest.mark.parametrize("trusted", [True, False])
def test_gradients_at_several_ranks_add_up_to_their_projections(m: int, n: int, ranks: tuple[int, ...], trusted: bool):
    layer: Any = LowRankLinear(n, m, bias=False, rank=5, dtype=torch.float64)
    layer.set_weight_(draw(m, n, seed=0))
    W, wanted = layer.weight.detach().as_subclass(Tensor), torch.zeros(m, n, dtype=torch.float64)
    for rank in ranks:
        x, y = draw(6, n, seed=rank), draw(6, m, seed=10 + rank)
        layer.active_rank = rank
        (layer(x) * y).sum().backward()
        wanted += projected(y.mT @ x, W, rank)
    at = read(layer.point(), trusted=trusted)
    found = project_gradient(at, read_gradient(at, layer.point(), layer.point_gradient(), trusted=trusted))
    matrix = at.U @ found.S @ at.V.mT + found.Up @ at.V.mT + at.U @ found.Vp.mT
    torch.testing.assert_close(matrix, wanted, atol=1e-10, rtol=0)
