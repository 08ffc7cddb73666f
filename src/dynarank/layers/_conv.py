"""What the low-rank twins of convolutions share: the options of the dense twin, and how filters and 1x1 follow."""

from abc import abstractmethod
from math import prod
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dynarank.layers.base import AbstractLowRankLayer, product

_CONVOLVE = {1: F.conv1d, 2: F.conv2d, 3: F.conv3d}


class AbstractConvTwin(AbstractLowRankLayer):
    """A low-rank layer with the options of a dense convolution, however its weight becomes a matrix."""

    dense_type: type[nn.Module]

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int | tuple[int, ...],
        stride: int | tuple[int, ...] = 1,
        padding: int | tuple[int, ...] | str = 0,
        dilation: int | tuple[int, ...] = 1,
        groups: int = 1,
        bias: bool = True,
        padding_mode: str = "zeros",
        *,
        rank: int,
        rank_multiple: int = 1,
        device: Any = None,
        dtype: Any = None,
    ) -> None:
        if groups != 1:
            raise ValueError(
                f"{type(self).__name__} needs groups = 1, got {groups}: the factors of one matrix would couple the "
                "groups. Keep a grouped convolution dense."
            )
        # The dense twin checks the options and spells them out; on the meta device it costs nothing.
        twin: Any = self.dense_type(
            in_channels, out_channels, kernel_size, stride, padding, dilation, 1, bias, padding_mode, device="meta"
        )
        rows, columns = self._sizes(out_channels, in_channels, twin.kernel_size)
        super().__init__(rows, columns, rank=rank, rank_multiple=rank_multiple, device=device, dtype=dtype)
        self.in_channels, self.out_channels, self.groups = in_channels, out_channels, 1
        self.kernel_size, self.stride, self.dilation = twin.kernel_size, twin.stride, twin.dilation
        self.padding, self.padding_mode = twin.padding, twin.padding_mode
        self._edges = list(twin._reversed_padding_repeated_twice)  # as F.pad takes them: last dimension first
        self._description = twin.extra_repr()
        self._add_bias(bias)
        self.reset_parameters()

    @classmethod
    def dense_options(cls, dense: Any) -> dict[str, Any]:
        """Return the options that this layer shares with its dense twin."""
        names = (
            "in_channels",
            "out_channels",
            "kernel_size",
            "stride",
            "padding",
            "dilation",
            "groups",
            "padding_mode",
        )
        return {name: getattr(dense, name) for name in names}

    @property
    def weight_shape(self) -> tuple[int, ...]:
        """Shape of the dense twin's weight, ``(out_channels, in_channels, *kernel_size)``."""
        return (self.out_channels, self.in_channels, *self.kernel_size)

    @classmethod
    @abstractmethod
    def _sizes(cls, out_channels: int, in_channels: int, kernel_size: tuple[int, ...]) -> tuple[int, int]:
        """Return the shape ``(m, n)`` of the weight as a matrix."""

    def dense_twin(self, device: Any = None) -> nn.Module:
        """Return a fresh dense convolution with the same options."""
        return self.dense_type(**self.dense_options(self), bias=self.bias is not None, **self._kind(device))

    def _describe(self) -> str:
        return self._description


class AbstractLowRankConv(AbstractConvTwin):
    """A convolution with ``r`` filters followed by a 1x1 convolution: ``W`` is the ``(out, in * kernel)`` matrix.

    Reference:
        Schotthöfer et al., "Low-rank lottery tickets", NeurIPS 2022, https://arxiv.org/abs/2205.13571, section 6.6
        (the same matricisation, there by unfolding the input).
    """

    dimensions: int

    @classmethod
    def _sizes(cls, out_channels: int, in_channels: int, kernel_size: tuple[int, ...]) -> tuple[int, int]:
        return out_channels, in_channels * prod(kernel_size)

    def forward(self, x: Tensor) -> Tensor:
        """Return the convolution of ``x`` with ``W``; shapes as in the dense twin, batched or not."""
        down, core, up = self._maps()
        if self.multiplies_out(down.shape[0]):
            return self._convolve(x, self.as_weight(product(down, core, up)), self.bias)
        z = self._convolve(x, down.reshape(-1, self.in_channels, *self.kernel_size), None)  # (N, r, *out)
        if core is not None:
            z = _mix_channels(z, core, None, self.dimensions)
        return _mix_channels(z, up.mT, self.bias, self.dimensions)

    def _convolve(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        padding = self.padding
        if self.padding_mode != "zeros":
            x, padding = F.pad(x, self._edges, mode=self.padding_mode), 0
        return _CONVOLVE[self.dimensions](x, weight, bias, self.stride, padding, self.dilation)  # type: ignore[operator]

    def _plain_twins(self, rank: int) -> tuple[Any, Any]:
        kind = self._kind("meta")
        first = self.dense_type(**self.dense_options(self) | {"out_channels": rank}, bias=False, **kind)
        return first, self.dense_type(rank, self.out_channels, 1, **kind)


def _mix_channels(z: Tensor, up: Tensor, bias: Tensor | None, dimensions: int) -> Tensor:
    """A 1x1 convolution ``(N, r, *s)`` to ``(N, m, *s)`` as one matrix product on the flattened map."""
    if z.dim() == dimensions + 1:
        return _mix_channels(z.unsqueeze(0), up, bias, dimensions).squeeze(0)
    if dimensions > 1 and z.stride(1) == 1:  # channels last: channels are already the inner dimension
        return F.linear(z.movedim(1, -1), up, bias).movedim(-1, 1)
    flat = z.flatten(2)  # (N, r, L)
    weight = up.expand(len(flat), *up.shape)
    # baddbmm on the flattened map instead of conv2d: 36 against 43 ms in a LeNet5 step.
    y = torch.bmm(weight, flat) if bias is None else torch.baddbmm(bias.unsqueeze(-1), weight, flat)
    return y.unflatten(2, z.shape[2:])
