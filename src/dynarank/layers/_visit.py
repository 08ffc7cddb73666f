"""A layer that stands at another point for a while, to take the gradient there."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from dynarank.layers.base import AbstractLowRankLayer, Point

PARAMETERS, BUFFERS = ("A", "B", "S"), ("U", "V")


@contextmanager
def visiting(layer: AbstractLowRankLayer, point: Point) -> Iterator[None]:
    """Let a layer stand at a point, with parameters of its own; afterwards all is as it was before.

    Inside, ``layer.point_gradient()`` returns the gradients there. The layer's own parameters, their gradients, hooks
    and versions are not touched.

    Args:
        layer: The layer.
        point: Factors of a matrix of its shape, of any rank.

    Example:
        >>> from dynarank import factors
        >>> from dynarank.layers.linear import LowRankLinear
        >>> layer = LowRankLinear(4, 3, rank=1)
        >>> with visiting(layer, factors.to_pair(factors.from_dense(torch.eye(3, 4), rank=3))):
        ...     layer.rank, layer(torch.ones(4)).shape
        (3, torch.Size([3]))
        >>> layer.rank
        1
    """
    like: Any = layer.A if layer.A is not None else layer.S
    parts = {name: part.to(like).clone(memory_format=torch.contiguous_format) for name, part in _parts(point).items()}
    rank, parameters = layer._rank, {name: layer._parameters[name] for name in PARAMETERS}
    buffers = {name: layer._buffers[name] for name in BUFFERS}
    try:
        layer._rank = point.rank
        layer._parameters.update({name: nn.Parameter(parts[name]) if name in parts else None for name in PARAMETERS})
        layer._buffers.update({name: parts.get(name) for name in BUFFERS})
        yield
    finally:
        layer._rank = rank
        layer._parameters.update(parameters)
        layer._buffers.update(buffers)


def _parts(point: Point) -> dict[str, torch.Tensor]:
    """Return the tensors of a point by name; what it has computed about itself is left out."""
    return {name: part for name, part in vars(point).items() if name in PARAMETERS + BUFFERS}
