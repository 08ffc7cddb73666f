"""One list of layers with every option of their dense twins; the tests in this folder run on all of them."""

from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from torch import Tensor

from dynarank.factors import FactorPair
from dynarank.layers.base import AbstractLowRankLayer
from dynarank.layers.conv1d import LowRankConv1d
from dynarank.layers.conv2d import LowRankConv2d
from dynarank.layers.conv2d_spatial import LowRankSpatialConv2d
from dynarank.layers.conv3d import LowRankConv3d
from dynarank.layers.embedding import LowRankEmbedding
from dynarank.layers.linear import LowRankLinear


@dataclass(frozen=True)
class Case:
    """A layer and an input for it."""

    cls: type[AbstractLowRankLayer]
    sizes: tuple[Any, ...]
    shape: tuple[int, ...]
    options: dict[str, Any] = field(default_factory=dict)

    def build(self, rank: int = 2, **more: Any) -> AbstractLowRankLayer:
        """Return a float64 layer with random factors in no particular gauge."""
        layer = self.cls(*self.sizes, **self.options, rank=rank, dtype=torch.float64, **more)
        m, n = layer.matrix_shape
        pair = FactorPair(torch.randn(rank, m, dtype=torch.float64), torch.randn(rank, n, dtype=torch.float64))
        layer.set_factors(pair)
        return layer

    @property
    def looks_up(self) -> bool:
        """Whether the inputs are indices, which have no gradient and no dtype to choose."""
        return self.cls is LowRankEmbedding

    def inputs(self, dtype: torch.dtype = torch.float64) -> Tensor:
        if self.looks_up:
            return torch.randint(self.sizes[0], self.shape)
        return torch.randn(self.shape, dtype=torch.float64).to(dtype)


CASES = {
    "linear": Case(LowRankLinear, (7, 5), (4, 7)),
    "linear-wide": Case(LowRankLinear, (5, 9), (3, 5), {"bias": False}),
    "linear-vector": Case(LowRankLinear, (7, 5), (7,)),
    "linear-4d": Case(LowRankLinear, (7, 5), (2, 3, 4, 7)),
    "linear-no-samples": Case(LowRankLinear, (7, 5), (0, 7)),
    "linear-no-tokens": Case(LowRankLinear, (7, 5), (3, 0, 7)),
    "conv1d": Case(LowRankConv1d, (4, 6, 3), (2, 4, 9)),
    "conv1d-same": Case(LowRankConv1d, (4, 6, 4), (2, 4, 9), {"padding": "same", "dilation": 2}),
    "conv1d-circular": Case(
        LowRankConv1d, (4, 6, 3), (2, 4, 9), {"padding": 2, "padding_mode": "circular", "bias": False}
    ),
    "conv1d-unbatched": Case(LowRankConv1d, (4, 6, 3), (4, 9), {"stride": 2}),
    "conv2d": Case(LowRankConv2d, (3, 8, 3), (2, 3, 7, 8)),
    "conv2d-no-bias": Case(LowRankConv2d, (3, 8, (3, 2)), (2, 3, 7, 8), {"bias": False, "padding": "valid"}),
    "conv2d-stride": Case(LowRankConv2d, (3, 8, 3), (2, 3, 7, 8), {"stride": (2, 1), "padding": (1, 2)}),
    "conv2d-same": Case(LowRankConv2d, (3, 8, (3, 2)), (2, 3, 7, 8), {"padding": "same", "dilation": (1, 2)}),
    "conv2d-reflect": Case(LowRankConv2d, (3, 8, 3), (2, 3, 7, 8), {"padding": (1, 2), "padding_mode": "reflect"}),
    "conv2d-replicate": Case(LowRankConv2d, (3, 8, 3), (2, 3, 7, 8), {"padding": 1, "padding_mode": "replicate"}),
    "conv2d-circular": Case(
        LowRankConv2d, (3, 8, 3), (2, 3, 7, 8), {"padding": "same", "padding_mode": "circular", "stride": 1}
    ),
    "conv2d-1x1": Case(LowRankConv2d, (5, 7, 1), (2, 5, 3, 3)),
    "conv2d-unbatched": Case(LowRankConv2d, (3, 8, 3), (3, 7, 8), {"padding": 1}),
    "conv2d-one-pixel": Case(LowRankConv2d, (3, 8, 3), (2, 3, 3, 3)),
    "conv2d-no-samples": Case(LowRankConv2d, (3, 8, 3), (0, 3, 7, 8)),
    "conv3d": Case(LowRankConv3d, (2, 7, 2), (2, 2, 4, 3, 5), {"stride": (1, 1, 2), "padding": (1, 0, 1)}),
    "conv3d-replicate": Case(LowRankConv3d, (2, 7, 2), (1, 2, 4, 3, 5), {"padding": 1, "padding_mode": "replicate"}),
    "conv3d-unbatched": Case(LowRankConv3d, (2, 7, (1, 3, 3)), (2, 4, 3, 5), {"padding": "same", "dilation": 1}),
    "spatial": Case(LowRankSpatialConv2d, (3, 8, 3), (2, 3, 7, 8)),
    "spatial-no-bias": Case(LowRankSpatialConv2d, (3, 8, (3, 2)), (2, 3, 7, 8), {"bias": False, "padding": "valid"}),
    "spatial-stride": Case(
        LowRankSpatialConv2d,
        (5, 7, (3, 5)),
        (2, 5, 9, 11),
        {"stride": (2, 1), "padding": (1, 3), "dilation": (1, 2)},
    ),
    "spatial-same": Case(LowRankSpatialConv2d, (3, 8, (3, 2)), (2, 3, 7, 8), {"padding": "same", "dilation": (1, 2)}),
    "spatial-reflect": Case(
        LowRankSpatialConv2d, (3, 8, 3), (2, 3, 7, 8), {"padding": (1, 2), "padding_mode": "reflect", "stride": (1, 2)}
    ),
    "spatial-replicate": Case(
        LowRankSpatialConv2d, (3, 8, (2, 5)), (2, 3, 7, 8), {"padding": 1, "padding_mode": "replicate"}
    ),
    "spatial-circular": Case(
        LowRankSpatialConv2d, (3, 8, (3, 5)), (2, 3, 7, 8), {"padding": "same", "padding_mode": "circular"}
    ),
    "spatial-tall": Case(LowRankSpatialConv2d, (3, 8, (3, 1)), (2, 3, 7, 8), {"padding": (1, 0)}),
    "spatial-wide": Case(LowRankSpatialConv2d, (5, 8, (1, 3)), (2, 5, 7, 8), {"padding": (0, 1)}),
    "spatial-unbatched": Case(LowRankSpatialConv2d, (3, 8, 3), (3, 7, 8), {"padding": 1}),
    "spatial-no-samples": Case(LowRankSpatialConv2d, (3, 8, 3), (0, 3, 7, 8)),
    "embedding": Case(LowRankEmbedding, (9, 7), (4, 5)),
    "embedding-wide": Case(LowRankEmbedding, (5, 9), (12,)),
    "embedding-padding": Case(LowRankEmbedding, (5, 7), (3, 8), {"padding_idx": 0}),
    "embedding-last-padding": Case(LowRankEmbedding, (6, 7), (4, 8), {"padding_idx": -1}),
    "embedding-scalar": Case(LowRankEmbedding, (5, 7), ()),
    "embedding-no-tokens": Case(LowRankEmbedding, (5, 7), (3, 0)),
}
KINDS = ("linear", "conv1d", "conv2d", "conv3d", "spatial", "embedding")


@pytest.fixture(params=CASES.values(), ids=CASES.keys())
def case(request: pytest.FixtureRequest) -> Case:
    """Every layer with every option."""
    return request.param


@pytest.fixture(params=KINDS)
def kind(request: pytest.FixtureRequest) -> Case:
    """One layer of each kind."""
    return CASES[request.param]


@pytest.fixture(params=["pair", "core"])
def form(request: pytest.FixtureRequest) -> str:
    return request.param
