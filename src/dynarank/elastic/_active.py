"""Which directions the layers of a model compute with, as a fraction of their ranks or layer by layer."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

from torch import nn

from dynarank.compress.statistics import tracking_layers
from dynarank.layers._factored import factored_layers
from dynarank.layers.base import AbstractLowRankLayer

Ranks = Mapping[str, int]  # by layer; those that are left out keep all their directions
Layers = Mapping[str, AbstractLowRankLayer]


def elastic_layers(model: nn.Module, *, owner: str) -> dict[str, AbstractLowRankLayer]:
    """Return the low-rank layers of a model, whose directions must have an order.

    Raises:
        ValueError: There is none, or one is in Tucker form.
    """
    found = factored_layers(model)
    if not found:
        raise ValueError(f"{owner} found no low-rank layer in the model. Call factorize_(model) first.")
    layers = {name: layer for name, layer in found.items() if isinstance(layer, AbstractLowRankLayer)}
    if others := ", ".join(name or "the layer" for name in found if name not in layers):
        raise ValueError(
            f"{owner}: {others} in Tucker form, whose ranks have no common order in which directions could "
            "be left out. Factorise convolutions with conv_form='matrix' or 'spatial'."
        )
    return layers


def fraction_of(ranks: Ranks, fraction: float) -> dict[str, int]:
    """Return a fraction of every rank, rounded, at least 1.

    Example:
        >>> fraction_of({"fc1": 16, "fc2": 3}, 0.125)
        {'fc1': 2, 'fc2': 1}
    """
    return {name: max(1, round(fraction * rank)) for name, rank in ranks.items()}


def check_fraction(fraction: float, *, owner: str) -> None:
    """Raise unless a fraction of the ranks is above 0 and at most 1."""
    if not 0 < fraction <= 1:
        raise ValueError(f"{owner}: a fraction of the ranks must be above 0 and at most 1, got {fraction}.")


def wanted_ranks(layers: Layers, ranks: float | Ranks, *, owner: str) -> dict[str, int]:
    """Return the rank that each layer is to have, from a fraction for all or from ranks for some.

    Raises:
        ValueError: The fraction or a rank is out of range, or a name is not that of a low-rank layer.
    """
    held = {name: layer.rank for name, layer in layers.items()}
    if not isinstance(ranks, Mapping):
        check_fraction(ranks, owner=owner)
        return fraction_of(held, ranks)
    for name, rank in ranks.items():
        if name not in held:
            raise ValueError(f"{owner}: {name!r} is no low-rank layer of the model. There are: {', '.join(held)}.")
        if not 1 <= rank <= held[name]:
            raise ValueError(f"{owner}: the rank of {name} must be between 1 and {held[name]}, its rank, got {rank}.")
    return held | dict(ranks)


def active_ranks(layers: Layers) -> dict[str, int]:
    """Return the number of directions that each layer computes with."""
    return {name: layer.active_rank for name, layer in layers.items()}


def activate(layers: Layers, ranks: Ranks) -> None:
    """Let each layer compute with so many of its directions."""
    for name, layer in layers.items():
        layer.active_rank = None if ranks[name] == layer.rank else ranks[name]


@contextmanager
def computing_with(layers: Layers, ranks: Ranks) -> Iterator[None]:
    """Let layers compute with so many of their directions for the time of a block."""
    before = active_ranks(layers)
    activate(layers, ranks)
    try:
        yield
    finally:
        activate(layers, before)


@contextmanager
def shielding_statistics(model: nn.Module) -> Iterator[None]:
    """Let batch normalisation in training mode leave its running statistics alone for the time of a block."""
    layers = tracking_layers(model)
    try:
        for layer in layers:
            layer.track_running_stats = False
        yield
    finally:
        for layer in layers:
            layer.track_running_stats = True
