"""The low-rank twin of ``nn.Conv3d``."""

from torch import nn

from dynarank.layers._conv import AbstractLowRankConv


class LowRankConv3d(AbstractLowRankConv):
    """A 3-dimensional convolution whose weight matrix ``(out, in * kernel)`` has low rank: r filters, then 1x1.

    Args and shapes are those of ``nn.Conv3d``, with ``rank`` and ``rank_multiple`` as in ``LowRankLinear``. Grouped
    convolutions are refused.

    Raises:
        ValueError: ``rank`` is out of range, or ``groups`` is not 1.

    Example:
        >>> import torch
        >>> layer = LowRankConv3d(3, 8, 3, padding=1, rank=2)
        >>> tuple(layer(torch.ones(4, 3, 6, 6, 6)).shape), tuple(layer.B.shape)
        ((4, 8, 6, 6, 6), (2, 81))

    Reference:
        Schotthöfer et al., "Low-rank lottery tickets", NeurIPS 2022, https://arxiv.org/abs/2205.13571.
    """

    dimensions = 3
    dense_type = nn.Conv3d
