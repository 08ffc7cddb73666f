"""The weight as one matrix of low rank: two factors of a linear layer, r filters and a 1x1 of a convolution."""

from typing import Any, final

import torch
from torch import nn

from dynarank import cost, factors
from dynarank._discovery import discover
from dynarank.compress.forms.base import (
    AbstractForm,
    Options,
    Rank,
    centred,
    correct_bias_,
    matrix_of,
    output_spectrum,
)
from dynarank.factors import FactorPair
from dynarank.layers._factored import AbstractFactoredLayer
from dynarank.layers.base import AbstractLowRankLayer
from dynarank.measure import Moments, Trace


@final
class Matrix(AbstractForm):
    """The low-rank twin of a layer, at the best approximation of its weight matrix.

    Reference:
        Eckart, Young, "The approximation of one matrix by another of lower rank", Psychometrika 1936; for convolutions
        Zhang et al., "Accelerating very deep convolutional networks", https://arxiv.org/abs/1505.06798.
    """

    def accepts(self, layer: Any) -> bool:
        if isinstance(layer, AbstractLowRankLayer):  # the matrix of some is not weight.flatten(1)
            return layer.matrix_shape[0] == layer.weight_shape[0]
        return twin_of(layer) is not None and not isinstance(layer, nn.Embedding)

    @torch.no_grad()
    def options(self, layer: Any, moments: Moments | None, trace: Trace | None) -> Options:
        W = matrix_of(layer)  # (m, n)
        m, n = W.shape
        errors = output_spectrum(W, centred(moments, layer)).errors
        pays = layer.rank - 1 if isinstance(layer, AbstractLowRankLayer) else cost.break_even_rank(m, n)
        ranks = range(1, min(pays, m, n) + 1)
        parameters = torch.tensor([cost.factor_parameters(m, n, r) for r in ranks], dtype=torch.int64)
        rows = trace.rows if trace else 0
        return Options("matrix", tuple((r,) for r in ranks), errors[1 : len(ranks) + 1], parameters, rows * parameters)

    @torch.no_grad()
    def build(self, layer: Any, moments: Moments | None, rank: Rank) -> nn.Module:
        W = matrix_of(layer)
        left = output_spectrum(W, centred(moments, layer), directions=True, count=rank[0]).U  # (m, r)
        assert left is not None
        right = left.mT @ W  # (r, n)
        new = _empty_twin(layer, rank[0])
        new.to_empty(device=layer.weight.device)
        new.set_factors(factors.to_pair(factors.read_pair(FactorPair(left.mT.contiguous(), right))))
        new.requires_grad_(next(layer.parameters()).requires_grad)
        new.bias = layer.bias
        correct_bias_(new, layer, moments, left @ right)
        return new.train(layer.training)

    def shaped(self, layer: Any, rank: Rank) -> nn.Module:
        new = _empty_twin(layer, rank[0]).to_empty(device=layer.weight.device)
        for parameter in new.parameters():
            nn.init.normal_(parameter, std=0.02)
        return new.to_plain()


def twin_of(layer: Any) -> Any:
    """Return the class of the low-rank twin of a layer, its own class where it is one already, or None."""
    if isinstance(layer, AbstractLowRankLayer):
        return type(layer)
    twins: Any = discover("dynarank.layers", AbstractFactoredLayer).values()
    return next((twin for twin in twins if isinstance(layer, twin.dense_type)), None)


def _empty_twin(layer: Any, rank: int) -> Any:
    options = twin_of(layer).dense_options(layer)
    return twin_of(layer)(**options, bias=layer.bias is not None, rank=rank, device="meta", dtype=layer.weight.dtype)
