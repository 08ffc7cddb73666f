"""Sharing out a budget of parameters or FLOPs among the directions of all layers, by what each is worth."""

from typing import Any

import torch
from torch import Tensor, nn

from dynarank import linalg
from dynarank.elastic._active import Layers, computing_with, elastic_layers, fraction_of
from dynarank.factorize import deployed_parameters
from dynarank.factors import FactorPair
from dynarank.layers.base import AbstractLowRankLayer
from dynarank.measure import Forward, Trace, call, flops, trace
from dynarank.ranks.base import LayerSpectrum, PlanContext
from dynarank.ranks.budget import Budget


@torch.no_grad()
def ranks_within_parameters(model: nn.Module, fraction: float) -> dict[str, int]:
    """Return ranks with which the deployed model holds at most a fraction of the parameters of the dense one.

    The same directions are kept as by the rank policy ``Budget``: those without which a layer would lose the largest
    part of its weight. Nothing is changed; give the result to `set_rank_`, or to ``Elastic.switch_``.

    Args:
        model: A model with low-rank layers whose directions are in order.
        fraction: Parameters allowed, as a fraction of the dense model's; every tensor counts.

    Raises:
        ValueError: The model has no low-rank layer, or one in Tucker form; ``fraction`` is not between 0 and 1; or it
            does not even hold rank 1 everywhere.

    Example:
        >>> from dynarank.layers.linear import LowRankLinear
        >>> ranks_within_parameters(LowRankLinear(40, 40, rank=10, bias=False), 0.25)  # 80 numbers each, 400 allowed
        {'': 5}
    """
    layers = elastic_layers(model, owner="ranks_within_parameters")
    now = deployed_parameters(model)
    others = now - sum(layer.deployed_parameters() for layer in layers.values())
    dense = others + sum(layer.dense_parameters for layer in layers.values())
    return _plan(layers, {}, fraction, PlanContext(0, dense, others))


@torch.no_grad()
def ranks_within_flops(model: nn.Module, fraction: float, batch: Any, *, forward: Forward = call) -> dict[str, int]:
    """Return ranks with which a forward pass takes at most a fraction of the FLOPs of the dense model.

    What counts are the FLOPs of two plain layers in the place of one, as after ``to_plain_``. Otherwise as
    `ranks_within_parameters`.

    Args:
        model: A model with low-rank layers whose directions are in order.
        fraction: FLOPs allowed, as a fraction of the dense model's.
        batch: The batch that is counted.
        forward: How it goes through the model.

    Raises:
        ValueError: As `ranks_within_parameters`.

    Example:
        >>> from dynarank.layers.linear import LowRankLinear
        >>> ranks_within_flops(LowRankLinear(40, 40, rank=10), 0.25, torch.ones(3, 40))
        {'': 5}
    """
    layers = elastic_layers(model, owner="ranks_within_flops")
    seen = trace(model, layers, batch, forward=forward)
    with computing_with(layers, fraction_of(dict.fromkeys(layers, 1), 1)):
        least = flops(model, batch, forward=forward)
        prices = {name: _flops(layer, seen[name]) for name, layer in layers.items()}
    others = least - sum(prices.values())
    dense = others + sum(_flops(layer.dense_twin("meta"), seen[name]) for name, layer in layers.items())
    return _plan(layers, prices, fraction, PlanContext(0, dense, others))


def _flops(layer: nn.Module, seen: Trace) -> int:
    """Return the FLOPs of a layer for inputs of the shapes that it saw; 0 where the model did not call it."""
    device = next(layer.parameters()).device
    inputs = [torch.zeros(shape, dtype=seen.input_dtype, device=device) for shape in seen.inputs]
    return flops(layer, inputs, forward=lambda layer, inputs: [layer(x) for x in inputs])


def _plan(layers: Layers, prices: dict[str, int], fraction: float, context: PlanContext) -> dict[str, int]:
    spectra = [LayerSpectrum(n, _sizes(x), x.matrix_shape, price=prices.get(n)) for n, x in layers.items()]
    decisions = Budget(fraction, growth=0, min_rank=1).plan(spectra, context)
    return {spectrum.name: decision.rank for spectrum, decision in zip(spectra, decisions, strict=True)}


def _sizes(layer: AbstractLowRankLayer) -> Tensor:
    """Return the size of each direction as it stands in the factors: the singular values, where these are in order."""
    point = layer.point()
    if isinstance(point, FactorPair):
        sizes = linalg.row_norms(point.A) * linalg.row_norms(point.B)
    else:
        sizes = point.sigma.abs()
    return sizes.double().cpu()
