"""The gradients of two plain factors give dK, dL and dS exactly: against the gradient of the dense twin's weight."""

import pytest
import torch
from torch import Tensor, nn

from dynarank import factors
from dynarank.factors import FactorPair, LowRankFactors, TangentGradient
from dynarank.layers.base import AbstractLowRankLayer
from dynarank.layers.conv1d import LowRankConv1d
from dynarank.layers.conv2d import LowRankConv2d
from dynarank.layers.conv3d import LowRankConv3d
from dynarank.layers.linear import LowRankLinear

LAYERS = {
    "linear, wide": (lambda: nn.Linear(7, 5), (6, 7)),
    "linear, tall": (lambda: nn.Linear(5, 7, bias=False), (2, 3, 5)),
    "conv1d": (lambda: nn.Conv1d(3, 8, 3, padding=1), (4, 3, 9)),
    "conv1d, circular": (lambda: nn.Conv1d(3, 8, 3, padding=1, padding_mode="circular"), (4, 3, 9)),
    "conv2d": (lambda: nn.Conv2d(2, 7, (3, 2)), (4, 2, 6, 5)),
    "conv2d, dilated": (lambda: nn.Conv2d(3, 6, 2, stride=(2, 1), padding=(1, 2), dilation=(1, 2)), (2, 3, 6, 7)),
    "conv2d, same, reflected": (lambda: nn.Conv2d(3, 6, 3, padding="same", padding_mode="reflect"), (2, 3, 5, 6)),
    "conv3d": (lambda: nn.Conv3d(2, 6, 2, stride=2), (3, 2, 4, 5, 6)),
    "conv3d, unbatched": (lambda: nn.Conv3d(2, 6, (1, 2, 2), bias=False), (2, 3, 4, 5)),
}
TWINS = {nn.Linear: LowRankLinear, nn.Conv1d: LowRankConv1d, nn.Conv2d: LowRankConv2d, nn.Conv3d: LowRankConv3d}


def make_layer(name: str, *, rank: int, spread: float, dtype: torch.dtype) -> tuple[AbstractLowRankLayer, Tensor]:
    """A layer in the balanced gauge whose singular values fall from 1 by ``spread`` decades, and an input."""
    make, size = LAYERS[name]
    dense = make().double()
    layer = TWINS[type(dense)].from_dense(dense, rank=rank)
    start = factors.from_dense(dense.weight.detach().flatten(1), rank=rank)
    sigma = torch.logspace(0, spread, rank, dtype=torch.float64)
    layer.to(dtype).set_factors(factors.to_pair(LowRankFactors(start.U, torch.diag(sigma), start.V)))
    return layer, torch.randn(size, dtype=torch.float64).to(dtype)


def loss_of(y: Tensor) -> Tensor:
    return (y.sin() * torch.linspace(-1, 2, y.numel(), dtype=y.dtype).reshape(y.shape)).sum()


def dense_gradient(layer: AbstractLowRankLayer, x: Tensor) -> Tensor:
    """The gradient of the dense twin's weight as a matrix, in float64."""
    dense = layer.to_dense().double()
    loss_of(dense(x.double())).backward()
    return dense.weight.grad.flatten(1)


def factor_gradient(layer: AbstractLowRankLayer, x: Tensor) -> FactorPair:
    loss_of(layer(x)).backward()
    return layer.point_gradient()


def check_projections(found: TangentGradient, at: LowRankFactors, G: Tensor, rtol: float) -> None:
    """Compare with ``G V``, ``G^T U`` and ``U^T G V``, each direction by its own size."""
    U, V = at.U.double(), at.V.double()
    for mine, dense in ((found.dK, G @ V), (found.dL, G.mT @ U), (found.dS, U.mT @ G @ V)):
        error = torch.linalg.vector_norm(mine.double() - dense, dim=-2)
        scale = torch.maximum(torch.linalg.vector_norm(G @ V, dim=-2), torch.linalg.vector_norm(G.mT @ U, dim=-2))
        assert bool((error <= rtol * scale).all()), (error / scale).tolist()


@pytest.mark.parametrize("name", LAYERS)
@pytest.mark.parametrize("rank", [1, 3, 5])
@pytest.mark.parametrize(("dtype", "rtol"), [(torch.float64, 1e-12), (torch.float32, 1e-5)])
@pytest.mark.parametrize("spread", [-1.0, -8.0])
def test_balanced_layers_give_the_dense_projections(
    name: str, rank: int, dtype: torch.dtype, rtol: float, spread: float
):
    layer, x = make_layer(name, rank=rank, spread=spread, dtype=dtype)
    gradient, G = factor_gradient(layer, x), dense_gradient(layer, x)
    at = factors.read_balanced(layer.point())
    check_projections(factors.tangent_gradient_balanced(at, gradient), at, G, rtol)


@pytest.mark.parametrize("name", LAYERS)
@pytest.mark.parametrize(("dtype", "rtol"), [(torch.float64, 1e-12), (torch.float32, 1e-5)])
@pytest.mark.parametrize("spread", [-1.0, -8.0])
def test_the_general_read_gives_them_in_the_balanced_gauge_too(
    name: str, dtype: torch.dtype, rtol: float, spread: float
):
    layer, x = make_layer(name, rank=4, spread=spread, dtype=dtype)
    gradient, G = factor_gradient(layer, x), dense_gradient(layer, x)
    at = factors.read_pair(layer.point())
    check_projections(factors.tangent_gradient(at, layer.point(), gradient), at, G, rtol)


@pytest.mark.parametrize("name", LAYERS)
@pytest.mark.parametrize("rank", [1, 5])
@pytest.mark.parametrize(("condition", "rtol"), [(1.0, 1e-12), (1e3, 1e-9)])
def test_any_gauge_gives_the_dense_projections(name: str, rank: int, condition: float, rtol: float):
    layer, x = make_layer(name, rank=rank, spread=-1.0, dtype=torch.float64)
    turn = torch.linalg.qr(torch.randn(rank, rank, dtype=torch.float64))[0]
    C = torch.diag(torch.logspace(0, torch.tensor(condition).log10().item(), rank).double()) @ turn
    pair = layer.point()
    layer.set_factors(FactorPair(C.mT @ pair.A, torch.linalg.solve(C, pair.B)))
    gradient, G = factor_gradient(layer, x), dense_gradient(layer, x)
    at = factors.read_pair(layer.point())
    check_projections(factors.tangent_gradient(at, layer.point(), gradient), at, G, rtol)


@pytest.mark.parametrize("shape", [(7, 5), (5, 7)])
def test_batches_of_layers_are_read_at_once(shape: tuple[int, int]):
    m, n = shape
    W, G = torch.randn(3, m, n, dtype=torch.float64), torch.randn(3, m, n, dtype=torch.float64)
    pair = factors.to_pair(factors.from_dense(W, rank=4))
    gradient = FactorPair(pair.B @ G.mT, pair.A @ G)
    at = factors.read_balanced(pair)
    check_projections(factors.tangent_gradient_balanced(at, gradient), at, G, 1e-12)
    at = factors.read_pair(pair)
    check_projections(factors.tangent_gradient(at, pair, gradient), at, G, 1e-12)


def test_the_core_gradient_is_the_projection():
    layer, x = make_layer("linear, wide", rank=3, spread=-8.0, dtype=torch.float64)
    layer.set_factors(layer.factors())
    loss_of(layer(x)).backward()
    U, V = layer.U, layer.V
    torch.testing.assert_close(layer.point_gradient(), U.mT @ dense_gradient(layer, x) @ V, atol=1e-12, rtol=0)
