"""A 2-dimensional convolution as two one-dimensional ones: down the columns, then along the rows."""

from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from dynarank.layers._conv import AbstractConvTwin
from dynarank.layers.base import product


class LowRankSpatialConv2d(AbstractConvTwin):
    """A ``kh x kw`` convolution as ``r`` filters ``kh x 1`` followed by filters ``1 x kw`` to all outputs.

    The weight ``W[o, i, a, b]`` is the matrix ``M[(o, b), (i, a)]`` of low rank: rows are outputs and columns of the
    kernel, columns are inputs and rows of the kernel. Args and shapes are those of ``nn.Conv2d``, with ``rank`` and
    ``rank_multiple`` as in ``LowRankLinear``. Grouped convolutions are refused.

    Shape:
        ``A (capacity, out_channels * kw)``, ``B (capacity, in_channels * kh)``.

    Raises:
        ValueError: ``rank`` is out of range, or ``groups`` is not 1.

    Example:
        >>> import torch
        >>> layer = LowRankSpatialConv2d(3, 8, (5, 3), padding=(2, 1), rank=4)
        >>> tuple(layer(torch.ones(2, 3, 6, 6)).shape), tuple(layer.A.shape), tuple(layer.B.shape)
        ((2, 8, 6, 6), (4, 24), (4, 15))

    Reference:
        Jaderberg, Vedaldi, Zisserman, "Speeding up convolutional neural networks with low rank expansions", BMVC 2014,
        https://arxiv.org/abs/1405.3866, scheme 2. The weight is on the manifold of matrices of rank ``r``, so that it
        trains as the other low-rank layers do.
    """

    dense_type = nn.Conv2d

    @classmethod
    def _sizes(cls, out_channels: int, in_channels: int, kernel_size: tuple[int, ...]) -> tuple[int, int]:
        return out_channels * kernel_size[1], in_channels * kernel_size[0]

    def as_matrix(self, weight: Tensor) -> Tensor:
        """Return a weight ``W[o, i, a, b]`` as ``M[(o, b), (i, a)]``."""
        return weight.permute(0, 3, 1, 2).reshape(self.matrix_shape)

    def as_weight(self, matrix: Tensor) -> Tensor:
        """Return ``M[(o, b), (i, a)]`` as the weight ``W[o, i, a, b]``."""
        kh, kw = self.kernel_size
        return matrix.reshape(self.out_channels, kw, self.in_channels, kh).permute(0, 2, 3, 1)

    def forward(self, x: Tensor) -> Tensor:
        """Return the convolution of ``x`` with ``W``; shapes as in ``nn.Conv2d``, batched or not."""
        down, core, up = self._maps()
        if self.multiplies_out(down.shape[0]):
            whole = {"stride": self.stride, "padding": self.padding, "dilation": self.dilation}
            return self._convolve(x, self.as_weight(product(down, core, up)), self.bias, self._edges, whole)
        if core is not None:  # it joins the first convolution
            down = core @ down
        kh, kw = self.kernel_size
        columns = down.reshape(-1, self.in_channels, kh, 1)
        # Contiguous: a kernel with the strides of channels last would decide the memory format of the output.
        rows = up.reshape(-1, self.out_channels, 1, kw).transpose(0, 1).contiguous()  # (out, r, 1, kw)
        over_columns, over_rows = self._options()
        z = self._convolve(x, columns, None, [0, 0, *self._edges[2:]], over_columns)  # (N, r, h', w)
        return self._convolve(z, rows, self.bias, [*self._edges[:2], 0, 0], over_rows)

    def _convolve(
        self, x: Tensor, weight: Tensor, bias: Tensor | None, edges: list[int], options: dict[str, Any]
    ) -> Tensor:
        if self.padding_mode != "zeros":
            x, options = F.pad(x, edges, mode=self.padding_mode), options | {"padding": 0}
        return F.conv2d(x, weight, bias, **options)

    def _options(self) -> tuple[dict[str, Any], dict[str, Any]]:
        """Return stride, padding and dilation of the two convolutions."""
        columns: dict[str, Any] = {}
        rows: dict[str, Any] = {}
        for name, neutral in (("stride", 1), ("padding", 0), ("dilation", 1)):
            value = getattr(self, name)
            named = isinstance(value, str)  # "same" and "valid" hold for each
            columns[name] = value if named else (value[0], neutral)
            rows[name] = value if named else (neutral, value[1])
        return columns, rows

    def _plain_twins(self, rank: int) -> tuple[Any, Any]:
        columns, rows = self._options()
        kh, kw = self.kernel_size
        more = {"padding_mode": self.padding_mode, **self._kind("meta")}
        first = nn.Conv2d(self.in_channels, rank, (kh, 1), **columns, bias=False, **more)
        return first, nn.Conv2d(rank, self.out_channels, (1, kw), **rows, **more)
