"""The rows that a weight matrix is multiplied by: vectors of a linear layer's input, patches of a convolution's."""

from collections.abc import Iterator
from dataclasses import dataclass
from math import prod
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from dynarank.layers.base import AbstractLowRankLayer

BLOCK = 2**24  # numbers unfolded at once: 64 MiB in float32, enough rows for an efficient product


@dataclass(frozen=True)
class Patches:
    """How a layer cuts its input into rows. Of a linear layer all tuples are empty.

    Attributes:
        columns: Length ``n`` of a row: the columns of ``weight.flatten(1)``.
        kernel: Size of the kernel in each dimension.
        stride: Step of the kernel in each dimension.
        dilation: Distance between the points of the kernel in each dimension.
        edges: Padding as ``F.pad`` takes it: before and after, last dimension first.
        mode: Mode of the padding as ``F.pad`` calls it.
    """

    columns: int
    kernel: tuple[int, ...] = ()
    stride: tuple[int, ...] = ()
    dilation: tuple[int, ...] = ()
    edges: tuple[int, ...] = ()
    mode: str = "constant"


def patches_of(name: str, layer: nn.Module) -> Patches:
    """Return how a layer cuts its input.

    Raises:
        TypeError: It is no linear layer and no convolution, or it has groups.
    """
    if isinstance(layer, nn.Linear):
        return Patches(layer.in_features)
    if isinstance(layer, AbstractLowRankLayer):
        return Patches(layer.matrix_shape[1]) if len(layer.weight_shape) == 2 else _of_convolution(layer)
    if isinstance(layer, nn.Conv1d | nn.Conv2d | nn.Conv3d) and layer.groups == 1:
        return _of_convolution(layer)
    groups = f" with groups = {layer.groups}" if hasattr(layer, "groups") else ""
    raise TypeError(
        f"{name} must be nn.Linear, a convolution with groups = 1 or a low-rank layer, "
        f"got {type(layer).__name__}{groups}; leave it out."
    )


def _of_convolution(layer: Any) -> Patches:
    columns = layer.in_channels * prod(layer.kernel_size)
    mode = "constant" if layer.padding_mode == "zeros" else layer.padding_mode
    return Patches(columns, layer.kernel_size, layer.stride, layer.dilation, _edges(layer), mode)


def _edges(layer: Any) -> tuple[int, ...]:
    if layer.padding == "same":
        spans = [d * (k - 1) for k, d in zip(layer.kernel_size, layer.dilation, strict=True)]
        pairs = [(span // 2, span - span // 2) for span in spans]
    else:
        padding = (0,) * len(layer.kernel_size) if layer.padding == "valid" else layer.padding
        pairs = [(width, width) for width in padding]
    return tuple(width for pair in reversed(pairs) for width in pair)


def blocks(x: Tensor, patches: Patches, *, size: int | None = None) -> Iterator[Tensor]:
    """Yield the rows of one input in blocks ``(rows, n)`` of at most ``size`` numbers, but of at least one row.

    Shape:
        ``x`` is ``(*, n)`` for a linear layer, ``(N, C, *spatial)`` or ``(C, *spatial)`` for a convolution, whose rows
        are in the order of ``weight.flatten(1)``: channels, then the kernel.

    Example:
        >>> import torch
        >>> [tuple(block.shape) for block in blocks(torch.zeros(5, 2, 3), Patches(3), size=12)]
        [(4, 3), (4, 3), (2, 3)]
    """
    if x.numel() == 0:
        return
    limit = max(1, (BLOCK if size is None else size) // patches.columns)
    if patches.kernel:
        yield from _split(_windows(x, patches), 1 + len(patches.kernel), limit)
    else:
        yield from x.reshape(-1, patches.columns).split(limit)


def _windows(x: Tensor, patches: Patches) -> Tensor:
    """Return a view ``(N, *output, C, *kernel)`` of the padded input."""
    dimensions = len(patches.kernel)
    if x.dim() == dimensions + 1:
        x = x.unsqueeze(0)
    if any(patches.edges):
        x = F.pad(x, patches.edges, mode=patches.mode)
    for i, (kernel, stride, dilation) in enumerate(zip(patches.kernel, patches.stride, patches.dilation, strict=True)):
        x = x.unfold(2 + i, dilation * (kernel - 1) + 1, stride)[..., ::dilation]
    return x.movedim(1, 1 + dimensions)


def _split(windows: Tensor, depth: int, limit: int) -> Iterator[Tensor]:
    """Yield the windows over the leading ``depth`` dimensions as rows, at most ``limit`` at a time."""
    inner = prod(windows.shape[1:depth])
    if depth > 1 and inner > limit:
        for part in windows:
            yield from _split(part, depth - 1, limit)
    else:
        for part in windows.split(limit // inner):
            yield part.flatten(depth).flatten(0, depth - 1)  # copies: patches overlap
