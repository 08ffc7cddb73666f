"""A small transformer that forecasts time series, and its narrower relatives of a given size."""

import math
from bisect import bisect_right
from typing import final

import torch
from torch import nn
from torch.nn import functional

DEVIATION = 0.02  # of all initial weights but those that end a residual branch
LEAST_VARIANCE = 1e-5  # of a series that is taken for constant


@final
class Forecaster(nn.Module):
    """A transformer over patches of time, with LayerNorm before each branch: it fills in the patches to come.

    Every series is forecast by itself, with the same weights. It is standardised by mean and standard deviation of
    what is known of it, cut into patches, and followed by as many patches to forecast, which enter as their learned
    positions alone; all patches see each other, and a linear layer reads the hours of those at the end. Every matrix is
    a layer of its own: ``patches``, ``query``, ``key``, ``value``, ``out``, ``up`` and ``down`` in each of ``blocks``,
    and ``head``. The defaults have 603,672 parameters.

    Args:
        lookback: Hours that are known, a multiple of ``patch``.
        horizon: Hours to forecast, a multiple of ``patch``.
        patch: Hours in a patch.
        layers: Number of blocks.
        heads: Attention heads per block.
        width: Features per patch, a multiple of ``heads``.
        mlp_ratio: Hidden units of the MLPs, as a multiple of ``width``; the product is rounded.
        dropout: Probability of dropping a feature of the embedding or of a branch, or an attention weight.

    Shape:
        - Input: ``(N, series, lookback)``, any number of series.
        - Output: ``(N, series, horizon)``.

    Raises:
        ValueError: If a size is below 1, if ``heads`` does not divide ``width`` or ``patch`` does not divide
            ``lookback`` and ``horizon``, or if ``dropout`` is no probability below 1.

    Example:
        >>> model = Forecaster()
        >>> model(torch.zeros(2, 7, 336)).shape
        torch.Size([2, 7, 96])
        >>> sum(parameter.numel() for parameter in model.parameters())
        603672

    Reference:
        Y. Nie, N. H. Nguyen, P. Sinthong, J. Kalagnanam, A time series is worth 64 words: long-term forecasting with
        transformers, ICLR 2023, https://arxiv.org/abs/2211.14730. There patches overlap, and one matrix reads all
        patches at once; here patches to come are tokens, so that nearly all parameters are in the blocks.
    """

    def __init__(
        self,
        *,
        lookback: int = 336,
        horizon: int = 96,
        patch: int = 24,
        layers: int = 3,
        heads: int = 4,
        width: int = 128,
        mlp_ratio: float = 4,
        dropout: float = 0.0,
    ) -> None:
        super().__init__()
        hidden = round(mlp_ratio * width)
        sizes = {"lookback": lookback, "horizon": horizon, "patch": patch}
        sizes |= {"layers": layers, "heads": heads, "width": width, "mlp_ratio * width": hidden}
        for name, size in sizes.items():
            if size < 1:
                raise ValueError(f"Forecaster: {name} must be at least 1, got {size}.")
        divisors = (("width", width, heads, "heads"), ("lookback", lookback, patch, "patch"))
        for name, size, divisor, by in (*divisors, ("horizon", horizon, patch, "patch")):
            if size % divisor:
                raise ValueError(f"Forecaster: {name} must be a multiple of {by} = {divisor}, got {size}.")
        if not 0 <= dropout < 1:
            raise ValueError(f"Forecaster: dropout must be at least 0 and below 1, got {dropout}.")
        self.lookback = lookback
        self.horizon = horizon
        self.patch = patch
        self.layers = layers
        self.heads = heads
        self.width = width
        self.hidden = hidden
        self.mlp_ratio = mlp_ratio
        self.dropout = dropout
        self.patches = nn.Linear(patch, width)
        self.positions = nn.Embedding((lookback + horizon) // patch, width)
        self.blocks = nn.Sequential(*(Block(width, heads, hidden, dropout=dropout) for _ in range(layers)))
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, patch)
        self._initialise()

    @torch.no_grad()
    def _initialise(self) -> None:
        # 2 * layers branches add up in the residual stream; the factor keeps its variance from growing with depth.
        last = DEVIATION / math.sqrt(2 * self.layers)
        for name, parameter in self.named_parameters():
            if parameter.dim() == 2:
                parameter.normal_(std=last if name.endswith(("out.weight", "down.weight")) else DEVIATION)
            elif name.endswith("bias"):
                parameter.zero_()

    def forward(self, series: torch.Tensor) -> torch.Tensor:
        mean = series.mean(-1, keepdim=True)  # (N, series, 1)
        deviation = (series.var(-1, keepdim=True, correction=0) + LEAST_VARIANCE).sqrt()
        known = ((series - mean) / deviation).unflatten(-1, (-1, self.patch)).flatten(0, 1)  # (N * series, T, patch)
        to_come = self.horizon // self.patch
        features = functional.pad(self.patches(known), (0, 0, 0, to_come)) + self.positions.weight
        features = self.blocks(functional.dropout(features, self.dropout, self.training))
        forecast = self.head(self.norm(features[:, -to_come:])).flatten(1)  # (N * series, horizon)
        return forecast.unflatten(0, series.shape[:2]) * deviation + mean

    def narrower(self, parameters: int) -> "Forecaster":
        """Build a freshly initialised Forecaster with as many layers and heads and at most ``parameters`` parameters.

        The width is the largest multiple of ``heads`` that fits with MLPs in proportion; then the MLPs alone are
        widened while that fits, since one step of the width can be many percent. The result is deterministic and never
        wider than this network, which is also what a ``parameters`` beyond its own count gives.

        Args:
            parameters: Largest number of parameters allowed: weights, biases, positions and LayerNorms.

        Raises:
            ValueError: If not even one feature per head fits.

        Example:
            >>> model = Forecaster().narrower(200_000)
            >>> model.width, model.hidden, sum(parameter.numel() for parameter in model.parameters())
            (72, 300, 199644)
        """

        def count(width: int, hidden: int) -> int:
            tokens = (self.lookback + self.horizon) // self.patch
            return forecaster_parameters(
                tokens=tokens, patch=self.patch, layers=self.layers, width=width, hidden=hidden
            )

        def in_proportion(width: int) -> int:
            return max(1, round(self.mlp_ratio * width))

        widths = range(self.heads, self.width + 1, self.heads)
        fitting = bisect_right(widths, parameters, key=lambda width: count(width, in_proportion(width)))
        if fitting == 0:
            least = count(self.heads, in_proportion(self.heads))
            raise ValueError(f"Forecaster.narrower: parameters must be at least {least}, got {parameters}.")
        width = widths[fitting - 1]
        units = range(in_proportion(width), self.hidden + 1)
        hidden = units[bisect_right(units, parameters, key=lambda hidden: count(width, hidden)) - 1]
        return Forecaster(
            lookback=self.lookback,
            horizon=self.horizon,
            patch=self.patch,
            layers=self.layers,
            heads=self.heads,
            width=width,
            mlp_ratio=hidden / width,
            dropout=self.dropout,
        )


@final
class Block(nn.Module):
    """Self-attention, then an MLP with GELU; each reads a LayerNorm of the features and is added to them.

    Shape:
        - Input: ``(N, T, width)``.
        - Output: ``(N, T, width)``.

    Example:
        >>> Block(8, 2, 32)(torch.zeros(3, 5, 8)).shape
        torch.Size([3, 5, 8])
    """

    def __init__(self, width: int, heads: int, hidden: int, *, dropout: float = 0.0) -> None:
        super().__init__()
        self.heads = heads
        self.dropout = dropout
        self.norm1 = nn.LayerNorm(width)
        self.query = nn.Linear(width, width)
        self.key = nn.Linear(width, width)
        self.value = nn.Linear(width, width)
        self.out = nn.Linear(width, width)
        self.norm2 = nn.LayerNorm(width)
        self.up = nn.Linear(width, hidden)
        self.down = nn.Linear(hidden, width)

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        features = features + self._drop(self._attend(self.norm1(features)))
        return features + self._drop(self.down(functional.gelu(self.up(self.norm2(features)))))

    def _attend(self, features: torch.Tensor) -> torch.Tensor:
        projections = (self.query(features), self.key(features), self.value(features))
        query, key, value = (p.unflatten(-1, (self.heads, -1)).transpose(-3, -2) for p in projections)
        dropout = self.dropout if self.training else 0.0
        mixed = functional.scaled_dot_product_attention(query, key, value, dropout_p=dropout)
        return self.out(mixed.transpose(-3, -2).flatten(-2))  # (N, T, width)

    def _drop(self, branch: torch.Tensor) -> torch.Tensor:
        return functional.dropout(branch, self.dropout, self.training)


def forecaster_parameters(*, tokens: int, patch: int, layers: int, width: int, hidden: int) -> int:
    """Count the parameters of a `Forecaster` of ``tokens`` patches, known and to come, without building it.

    Example:
        >>> count = forecaster_parameters(tokens=18, patch=24, layers=3, width=128, hidden=512)
        >>> count, count == sum(parameter.numel() for parameter in Forecaster().parameters())
        (603672, True)
    """
    block = 4 * (width + 1) * width + (width + 1) * hidden + (hidden + 1) * width
    ends = (patch + 1) * width + tokens * width + (width + 1) * patch
    return ends + layers * block + (2 * layers + 1) * 2 * width
