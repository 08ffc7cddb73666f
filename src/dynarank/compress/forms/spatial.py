"""A convolution as two one-dimensional ones: down the columns to r channels, then along the rows."""

from math import prod
from typing import Any, final

import torch
from torch import Tensor, nn

from dynarank import cost, factors
from dynarank.compress.forms._shared_basis import SharedBasis, corrected, expanded, fit_on, improved, shared_basis
from dynarank.compress.forms.base import (
    AbstractForm,
    Options,
    Rank,
    centred,
    correct_bias_,
    matrix_of,
)
from dynarank.factors import FactorPair
from dynarank.layers.conv2d_spatial import LowRankSpatialConv2d
from dynarank.measure import Moments, Trace


@final
class Spatial(AbstractForm):
    """A convolution ``kh x 1`` followed by one ``1 x kw``, for kernels that extend both ways.

    The columns of a patch are one vector ``x_b`` at ``kw`` shifts, and the first convolution reduces each to the same
    ``r`` numbers. The errors of all ranks are exact but for what `improved` brings: that is computed at a few of them
    and interpolated. Without moments the result is the truncated singular value decomposition.

    Reference:
        Jaderberg, Vedaldi, Zisserman, "Speeding up convolutional neural networks with low rank expansions", BMVC 2014,
        https://arxiv.org/abs/1405.3866. Where they minimise the error of the outputs step by step from a random start,
        we start from the best directions for columns that are uncorrelated, as if each were an input of its own.
    """

    def accepts(self, layer: Any) -> bool:
        if isinstance(layer, LowRankSpatialConv2d):
            return True
        return isinstance(layer, nn.Conv2d) and layer.groups == 1 and min(layer.kernel_size) > 1

    @torch.no_grad()
    def options(self, layer: Any, moments: Moments | None, trace: Trace | None) -> Options:
        W, metric, (kh, kw) = matrix_of(layer), centred(moments, layer), layer.kernel_size
        m, n = layer.out_channels * kw, layer.in_channels * kh
        pays = layer.rank - 1 if isinstance(layer, LowRankSpatialConv2d) else cost.break_even_rank(m, n)
        ranks = range(1, min(pays, m, n) + 1)
        basis = shared_basis(W, metric, shifts=kw, count=max(1, len(ranks)))
        errors = basis.errors[1 : len(ranks) + 1]
        if metric is not None:
            errors = corrected(errors, lambda i: basis.error_of(W - _rank_r(basis, W, metric, ranks[i])[0], metric))
        parameters = torch.tensor([cost.factor_parameters(m, n, r) for r in ranks], dtype=torch.int64)
        between = n * _rows_between(layer, trace) + m * trace.rows if trace else 0
        return Options("spatial", tuple((r,) for r in ranks), errors, parameters, parameters // (m + n) * between)

    @torch.no_grad()
    def build(self, layer: Any, moments: Moments | None, rank: Rank) -> nn.Module:
        W, metric, kw = matrix_of(layer), centred(moments, layer), layer.kernel_size[1]
        basis = shared_basis(W, metric, shifts=kw, count=rank[0])
        approximation, weights, V = _rank_r(basis, W, metric, rank[0])
        new = _empty(layer, rank[0])
        new.to_empty(device=layer.weight.device)
        pair = FactorPair(weights.movedim(1, 0).flatten(1), V.mT.contiguous())
        new.set_factors(factors.to_pair(factors.read_pair(pair)))
        new.requires_grad_(next(layer.parameters()).requires_grad)
        new.bias = layer.bias
        correct_bias_(new, layer, moments, approximation)
        return new.train(layer.training)

    def shaped(self, layer: Any, rank: Rank) -> nn.Module:
        new = _empty(layer, rank[0]).to_empty(device=layer.weight.device)
        for parameter in new.parameters():
            nn.init.normal_(parameter, std=0.02)
        return new.to_plain()


def _rank_r(basis: SharedBasis, W: Tensor, metric: Tensor | None, rank: int) -> tuple[Tensor, Tensor, Tensor]:
    """Return the approximation of ``W``, its weights ``(out, r, kw)`` and its directions ``(in * kh, r)``, improved."""
    V = basis.V[:, :rank]
    if metric is not None:
        V = improved(V, W, metric, shifts=basis.shifts, total=basis.total)
    weights = fit_on(V, W, metric, shifts=basis.shifts)
    return expanded(weights, V), weights, V


def _empty(layer: Any, rank: int) -> LowRankSpatialConv2d:
    options = LowRankSpatialConv2d.dense_options(layer) | {"bias": layer.bias is not None, "rank": rank}
    return LowRankSpatialConv2d(**options, device="meta", dtype=layer.weight.dtype)


def _rows_between(layer: Any, trace: Trace) -> int:
    """Return at how many positions the first convolution is taken: rows of the output, columns of the input."""
    span = layer.dilation[0] * (layer.kernel_size[0] - 1)
    edges = 2 * layer.padding[0] if isinstance(layer.padding, tuple) else span * (layer.padding == "same")
    slack = edges - span - 1
    return sum(prod(n) * ((h + slack) // layer.stride[0] + 1) * w for *n, _, h, w in trace.inputs)
