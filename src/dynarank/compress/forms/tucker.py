"""A convolution between fewer channels: 1x1 to r_in channels, the kernel to r_out channels, 1x1 to all outputs."""

from collections.abc import Sequence
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
    left_over,
    matrix_of,
    output_spectrum,
)
from dynarank.factors import FactorPair
from dynarank.layers.conv2d import LowRankConv2d
from dynarank.measure import Moments, Trace

STEPS = 24  # about as many sizes of each rank are offered


@final
class Tucker(AbstractForm):
    """The kernel between fewer input and output channels, both reduced by 1x1 convolutions; rank ``(r_out, r_in)``.

    The first layer is a plain convolution; the other two are one low-rank layer of rank ``r_out``. The input channels
    are reduced to directions that are chosen first. Given these, kernel and output directions are the best there are:
    the least-squares fit of the outputs of rank ``r_out``, in the metric of the whole patch. Errors are exact but where
    a layer has more than a few options: then what `improved` brings is computed at some and interpolated.

    Reference:
        Kim et al., "Compression of deep convolutional neural networks for fast and low power mobile applications",
        ICLR 2016, https://arxiv.org/abs/1511.06530. We reduce the error of the outputs instead of that of the weight,
        and offer many pairs of ranks instead of estimating one. For the fit of rank ``r_out``: Zhang et al.,
        "Accelerating very deep convolutional networks", https://arxiv.org/abs/1505.06798.
    """

    def accepts(self, layer: Any) -> bool:
        return isinstance(layer, nn.Conv2d) and layer.groups == 1 and prod(layer.kernel_size) > 1

    @torch.no_grad()
    def options(self, layer: Any, moments: Moments | None, trace: Trace | None) -> Options:
        W, metric, shifts = matrix_of(layer), centred(moments, layer), prod(layer.kernel_size)
        basis = shared_basis(W, metric, shifts=shifts, count=layer.in_channels)
        pairs = _path(output_spectrum(W, metric).errors, basis.errors, layer)
        errors = _errors(basis, pairs)
        if metric is not None:
            errors = corrected(errors, lambda i: basis.error_of(W - _between(basis, W, metric, pairs[i])[0], metric))
        sizes = torch.tensor([_sizes(layer, pair) for pair in pairs], dtype=torch.int64).reshape(-1, 2)
        rows = torch.tensor([_pixels(trace), trace.rows] if trace else [0, 0])
        return Options("tucker", tuple(pairs), errors, sizes.sum(1), sizes @ rows)

    @torch.no_grad()
    def build(self, layer: Any, moments: Moments | None, rank: Rank) -> nn.Module:
        W, metric = matrix_of(layer), centred(moments, layer)
        basis = shared_basis(W, metric, shifts=prod(layer.kernel_size), count=rank[1])
        approximation, U, kernel, V = _between(basis, W, metric, rank)
        first, second = (part.to_empty(device=layer.weight.device) for part in _empty(layer, rank))
        first.weight.copy_(V.mT[..., None, None])
        if layer.weight.is_contiguous(memory_format=torch.channels_last):
            first = first.to(memory_format=torch.channels_last)
        pair = FactorPair(U.mT.contiguous(), kernel.flatten(1))
        second.set_factors(factors.to_pair(factors.read_pair(pair)))
        new = nn.Sequential(first, second).requires_grad_(next(layer.parameters()).requires_grad)
        second.bias = layer.bias
        correct_bias_(second, layer, moments, approximation)
        return new.train(layer.training)

    def shaped(self, layer: Any, rank: Rank) -> nn.Module:
        new = nn.Sequential(*_empty(layer, rank)).to_empty(device=layer.weight.device)
        for parameter in new.parameters():
            nn.init.normal_(parameter, std=0.02)
        second: Any = new[1]
        return nn.Sequential(new[0], *second.to_plain())


def _errors(basis: SharedBasis, pairs: Sequence[Rank]) -> Tensor:
    """Return the relative squared errors with the directions of ``basis`` as they are."""
    spectra = {
        inner: left_over(output_spectrum(basis.fits[:, :inner].flatten(1), None).energies, basis.total)
        for inner in {inner for _, inner in pairs}
    }
    return torch.tensor([float(spectra[inner][outer]) for outer, inner in pairs], dtype=torch.float64)


def _between(basis: SharedBasis, W: Tensor, metric: Tensor | None, rank: Rank) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return the approximation of ``W``, the directions of outputs, the kernel and the improved directions of inputs.

    Shape:
        ``W (out, in * s)`` gives ``(out, in * s)``, ``U (out, r_out)``, ``(r_out, r_in, s)``, ``V (in, r_in)``.
    """
    outer, inner = rank
    V = basis.V[:, :inner]
    weights, U = _fitted(V, W, metric, outer)
    if metric is not None:
        V = improved(V, U.mT @ W, metric, shifts=basis.shifts, total=basis.total)
        weights, U = _fitted(V, W, metric, outer)
    kernel = torch.einsum("mo,mks->oks", U, weights)
    return U @ expanded(kernel, V), U, kernel, V


def _fitted(V: Tensor, W: Tensor, metric: Tensor | None, outer: int) -> tuple[Tensor, Tensor]:
    """Return the weights on ``V`` that are the best fit of the outputs, and the leading directions of that."""
    weights = fit_on(V, W, metric, shifts=W.shape[1] // len(V))  # (out, r_in, s)
    U = output_spectrum(expanded(weights, V), metric, directions=True, count=outer).U
    assert U is not None
    return weights, U


def _empty(layer: Any, rank: Rank) -> tuple[Any, Any]:
    outer, inner = rank
    kind: dict[str, Any] = {"device": "meta", "dtype": layer.weight.dtype}
    options = LowRankConv2d.dense_options(layer) | {"in_channels": inner}
    first = nn.Conv2d(layer.in_channels, inner, 1, bias=False, **kind)
    return first, LowRankConv2d(**options, bias=layer.bias is not None, rank=outer, **kind)


def _sizes(layer: Any, rank: Rank) -> tuple[int, int]:
    """Return the numbers in the first layer and in the two that follow."""
    outer, inner = rank
    columns = inner * prod(layer.kernel_size)
    return layer.in_channels * inner, cost.factor_parameters(layer.out_channels, columns, outer)


def _path(of_outputs: Tensor, of_inputs: Tensor, layer: Any) -> list[Rank]:
    """Return pairs of ranks that grow one at a time, each by the one that lowers the error more for its numbers.

    The error is taken to be the sum of those of each reduction alone, ``of_outputs[r_out] + of_inputs[r_in]``.
    """
    outer, inner = _ladder(len(of_outputs) - 1), _ladder(len(of_inputs) - 1)

    def gain(now: Rank, pair: Rank) -> float:
        fall = of_outputs[now[0]] - of_outputs[pair[0]] + of_inputs[now[1]] - of_inputs[pair[1]]
        return float(fall) / (sum(_sizes(layer, pair)) - sum(_sizes(layer, now)))

    pairs: list[Rank] = []
    steps = [(outer[0], inner[0])]
    while steps := [pair for pair in steps if _pays(layer, pair)]:
        pairs.append(max(steps, key=lambda pair: gain(pairs[-1], pair)) if pairs else steps[0])
        steps = [(r, pairs[-1][1]) for r in outer if r > pairs[-1][0]][:1]
        steps += [(pairs[-1][0], r) for r in inner if r > pairs[-1][1]][:1]
    return pairs


def _pays(layer: Any, rank: Rank) -> bool:
    """Whether the three layers hold fewer numbers than the one, and the last two fewer than one in their place."""
    columns = rank[1] * prod(layer.kernel_size)
    return sum(_sizes(layer, rank)) < layer.weight.numel() and rank[0] <= cost.break_even_rank(
        layer.out_channels, columns
    )


def _ladder(channels: int) -> list[int]:
    """Return the ranks that are offered: powers of two, then multiples of one.

    Example:
        >>> _ladder(60)
        [1, 2, 4, 8, 12, 16, 20, 24, 28, 32, 36, 40, 44, 48, 52, 56, 60]
    """
    step = 1
    while step * STEPS < channels:
        step *= 2
    powers = [2**k for k in range(step.bit_length() - 1)]
    return [*powers, *range(step, channels + 1, step)]


def _pixels(trace: Trace) -> int:
    """Return at how many positions the first convolution is taken: those of the input."""
    return sum(prod(shape) // shape[-3] for shape in trace.inputs)
