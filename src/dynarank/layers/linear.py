"""The low-rank twin of ``nn.Linear``."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dynarank.layers.base import AbstractLowRankLayer, product


class LowRankLinear(AbstractLowRankLayer):
    """A linear map whose weight has low rank: ``y = (x B^T) A + b`` with ``W = A^T B``.

    Args:
        in_features: Size ``n`` of the last dimension of the input.
        out_features: Size ``m`` of the last dimension of the output.
        rank: Rank to start with. The factors start at the truncated SVD of a freshly initialised ``nn.Linear``.
        bias: Whether to add a bias.
        rank_multiple: Store factors in multiples of this many rows.
        device: Where to store the factors.
        dtype: Type of the factors. Decompositions run in at least float32.

    Shape:
        Input ``(*, in_features)``, output ``(*, out_features)``; ``A (capacity, m)``, ``B (capacity, n)``.

    Raises:
        ValueError: ``rank`` is not between 1 and ``min(in_features, out_features)``.

    Example:
        >>> import torch
        >>> layer = LowRankLinear(20, 10, rank=3)
        >>> layer(torch.ones(4, 20)).shape, layer.A.shape, layer.B.shape, layer.weight.shape
        (torch.Size([4, 10]), torch.Size([3, 10]), torch.Size([3, 20]), torch.Size([10, 20]))

    Reference:
        Schotthöfer, Zangrando, Kusch, Ceruti, Tudisco, "Low-rank lottery tickets", NeurIPS 2022,
        https://arxiv.org/abs/2205.13571. We store two factors instead of three so that gradients are true gradients.
    """

    dense_type = nn.Linear

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        *,
        rank: int,
        rank_multiple: int = 1,
        device: Any = None,
        dtype: Any = None,
    ) -> None:
        super().__init__(out_features, in_features, rank=rank, rank_multiple=rank_multiple, device=device, dtype=dtype)
        self.in_features, self.out_features = in_features, out_features
        self._add_bias(bias)
        self.reset_parameters()

    @classmethod
    def dense_options(cls, dense: nn.Linear) -> dict[str, Any]:
        """Return the options that this layer shares with ``nn.Linear``."""
        return {"in_features": dense.in_features, "out_features": dense.out_features}

    @property
    def weight_shape(self) -> tuple[int, ...]:
        """Shape of the dense twin's weight, ``(out_features, in_features)``."""
        return self.matrix_shape

    def forward(self, x: Tensor) -> Tensor:
        """Return ``x W^T + b``; ``(*, n)`` gives ``(*, m)``."""
        down, core, up = self._maps()
        bias = self.bias
        if self.multiplies_out(down.shape[0], x.numel() // self.in_features):
            return F.linear(x, product(down, core, up), bias)
        # Of matrices, and by addmm: F.linear would take each product through views, all of which autograd records.
        rows = x if x.dim() == 2 else x.reshape(-1, x.shape[-1])
        z = F.linear(rows, down)  # (N, r)
        if core is not None:
            z = F.linear(z, core)
        y = z @ up if bias is None else torch.addmm(bias, z, up)  # (N, m)
        return y if x.dim() == 2 else y.view(*x.shape[:-1], self.out_features)

    def dense_twin(self, device: Any = None) -> nn.Linear:
        """Return a fresh ``nn.Linear`` with the same options."""
        return nn.Linear(self.in_features, self.out_features, self.bias is not None, **self._kind(device))

    def _plain_twins(self, rank: int) -> tuple[nn.Linear, nn.Linear]:
        kind = self._kind("meta")
        return nn.Linear(self.in_features, rank, False, **kind), nn.Linear(rank, self.out_features, **kind)

    def _describe(self) -> str:
        return f"in_features={self.in_features}, out_features={self.out_features}, bias={self.bias is not None}"
