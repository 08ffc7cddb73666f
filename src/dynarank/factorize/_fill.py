"""Ranks that fill a number of parameters: about the same part of the full rank in every layer."""

import heapq
from collections.abc import Iterable, Mapping, Sequence

from torch import nn

from dynarank.factorize._select import shortened
from dynarank.factorize._targets import Target

Rank = int | float


def filling(
    targets: Iterable[tuple[nn.Module, Target]],
    *,
    others: int,
    parameters: int,
    most: Mapping[nn.Module, int],
    dense: Sequence[str] = (),
) -> dict[nn.Module, Rank]:
    """Return for each layer the rank, or for a tensor the fraction of each mode, at which all fill the parameters.

    The layer that is furthest behind takes the next rank, for as long as any fits.

    Args:
        targets: Layers and what each would become.
        others: Numbers that everything else takes.
        parameters: Numbers that all may take together, as deployed.
        most: Largest rank of some of the layers.
        dense: Layers that stay dense whatever the parameters, each with the reason.

    Raises:
        ValueError: Not even the smallest ranks fit.
    """
    layers = list(targets)
    levels = [1] * len(layers)
    total = others + sum(_numbers(target, 1) for _, target in layers)
    if total > parameters:
        staying = f" Layers that stay dense: {shortened(dense)}." if dense else ""
        raise ValueError(
            f"{parameters:,} parameters are too few for this network at low rank: the smallest ranks everywhere take "
            f"{total:,}. Allow more, or factorise the head as well with include_head.{staying}"
        )
    behind = [(2 / _levels(target), place) for place, (_, target) in enumerate(layers)]
    heapq.heapify(behind)
    while behind:
        part, place = heapq.heappop(behind)
        (layer, target), level = layers[place], levels[place] + 1
        more = _numbers(target, level) - _numbers(target, level - 1) if part <= 1 else 0
        if part > 1 or level > most.get(layer, level) or total + more > parameters:
            continue  # full, or the next would be too large
        levels[place], total = level, total + more
        heapq.heappush(behind, ((level + 1) / _levels(target), place))
    return {layer: _value(target, level) for (layer, target), level in zip(layers, levels, strict=True)}


def _levels(target: Target) -> int:
    """Return how many ranks a layer can have, or the largest mode of a tensor."""
    return max(target.weight[: target.modes]) if target.modes else min(target.shape)


def _value(target: Target, level: int) -> Rank:
    return level / _levels(target) if target.modes else level


def _numbers(target: Target, level: int) -> int:
    """Return what a layer takes as deployed: its factors, or the dense weight where that is smaller or equal."""
    ranks = target.mode_ranks(_value(target, level)) if target.modes else (level,)
    return min(target.numbers(ranks), target.entries)
