"""Cutting a network to smaller ranks, for good and without training."""

from collections.abc import Iterable
from typing import Any

import torch
from torch import nn

from dynarank import factors
from dynarank.compress.statistics import renew_statistics_, tracking_layers
from dynarank.elastic._active import Ranks, active_ranks, computing_with, elastic_layers, wanted_ranks
from dynarank.elastic.training import missing_statistics
from dynarank.factors import FactorPair, LowRankFactors
from dynarank.measure import Forward, call


@torch.no_grad()
def set_rank_(
    model: nn.Module, ranks: float | Ranks, *, calibration: Iterable[Any] | None = None, forward: Forward = call
) -> dict[str, int]:
    """Keep the leading directions of every low-rank layer and drop the others; shapes shrink, nothing is trained.

    After ``LowRankOptimizer``, or right after `order_`, that is the truncated SVD of every weight. After another
    optimizer it is whatever stands first in the factors: call `order_` before, unless `Elastic` has put what matters
    first. A switch of `Elastic` ends. The state of an optimizer is not cut, so build it anew to train on;
    ``LowRankOptimizer`` may stay, and starts its momentum afresh.

    Args:
        model: The model, changed in place.
        ranks: A fraction of the rank for all layers, above 0 and at most 1, or the rank of each of some: chosen by
            hand, or by `ranks_within_parameters` and `ranks_within_flops`.
        calibration: Batches of training data, to estimate the statistics of batch normalisation anew. Needed where
            the model has such layers and computes with other ranks now.
        forward: How a batch goes through the model.

    Returns:
        The rank of each layer.

    Raises:
        ValueError: The model has no low-rank layer, or one in Tucker form; a fraction or a rank is out of range; or
            the model has batch normalisation and ``calibration`` is missing or does not fit. Nothing has changed.
        RuntimeError: A live graph holds a factor, which cannot change its shape then.

    Example:
        >>> from dynarank.layers.linear import LowRankLinear
        >>> model = nn.Sequential(LowRankLinear(20, 10, rank=8), nn.ReLU(), LowRankLinear(10, 10, rank=4))
        >>> set_rank_(model, 0.25)
        {'0': 2, '2': 1}
        >>> tuple(model[0].A.shape)
        (2, 10)

    Reference:
        S. Horváth, S. Laskaridis, S. Rajput, H. Wang, "Maestro: uncovering low-rank structures via trainable
        decomposition", ICML 2024, https://arxiv.org/abs/2308.14929: one training, any size.
    """
    layers = elastic_layers(model, owner="set_rank_")
    wanted = wanted_ranks(layers, ranks, owner="set_rank_")
    cut = {name: layer for name, layer in layers.items() if wanted[name] < layer.rank}
    for name, layer in cut.items():
        if reason := layer.resize_refusal():
            raise RuntimeError(f"set_rank_: {name} cannot change its shape now: {reason}. Delete old losses first.")
    normalisation = tracking_layers(model) if active_ranks(layers) != wanted else []
    if normalisation and calibration is None:
        raise missing_statistics("set_rank_", len(normalisation))
    if calibration is not None and normalisation:
        with computing_with(layers, wanted):
            renew_statistics_(model, calibration, forward=forward)
    for name, layer in layers.items():
        layer.active_rank = None
        if name in cut:
            layer.set_factors(_leading(layer.point(), wanted[name]))
    return wanted


def _leading(point: FactorPair | LowRankFactors, rank: int) -> FactorPair | LowRankFactors:
    if isinstance(point, FactorPair):
        return FactorPair(point.A[:rank], point.B[:rank])
    return LowRankFactors(point.U[:, :rank], point.S[:rank, :rank], point.V[:, :rank])


@torch.no_grad()
def order_(model: nn.Module) -> None:
    """Diagonalise the factors of every low-rank layer, so that its leading directions are its truncated SVD.

    The weights stay as they are, to rounding. ``LowRankOptimizer`` keeps this order by itself. Do not call it where
    `Elastic` trained with another optimizer: the directions have an order already, and that of the singular values is
    another.

    Args:
        model: The model, changed in place.

    Raises:
        ValueError: The model has no low-rank layer, or one in Tucker form.

    Example:
        >>> from dynarank.layers.linear import LowRankLinear
        >>> layer = LowRankLinear(2, 2, rank=2)
        >>> layer.set_factors(FactorPair(torch.eye(2), torch.diag(torch.tensor([1.0, 4.0]))))
        >>> order_(layer)
        >>> set_rank_(layer, 0.5), layer.weight.diagonal().round().tolist()
        ({'': 1}, [0.0, 4.0])
    """
    for layer in elastic_layers(model, owner="order_").values():
        point = layer.point()
        at = factors.read_pair(point) if isinstance(point, FactorPair) else factors.diagonalise(point)
        layer.set_factors(at, form=layer.form, resize=False)
