"""A small vision transformer, and its narrower relatives of a given size."""

import math
from bisect import bisect_right
from typing import final

import torch
from torch import nn
from torch.nn import functional

DEVIATION = 0.02  # of all initial weights but those that end a residual branch


@final
class ViT(nn.Module):
    """A transformer over the patches of an image, with LayerNorm before each branch; a linear layer reads the mean.

    Every matrix is a layer of its own: ``query``, ``key``, ``value``, ``out``, ``up`` and ``down`` in each of
    ``blocks``, and ``head``; ``patches`` is a convolution. Positions are learned. There is no class token. The defaults
    have 2,693,194 parameters.

    Args:
        layers: Number of blocks.
        heads: Attention heads per block.
        width: Features per patch, a multiple of ``heads``.
        mlp_ratio: Hidden units of the MLPs, as a multiple of ``width``; the product is rounded.
        image: Side of the square input images, a multiple of ``patch``.
        patch: Side of a patch.
        channels: Channels of the input images.
        classes: Outputs of ``head``; logits, without softmax.

    Shape:
        - Input: ``(N, channels, image, image)``.
        - Output: ``(N, classes)``.

    Raises:
        ValueError: If a size is below 1, if ``heads`` does not divide ``width``, or if ``patch`` does not divide
            ``image``.

    Example:
        >>> model = ViT()
        >>> model(torch.zeros(2, 3, 32, 32)).shape
        torch.Size([2, 10])
        >>> sum(parameter.numel() for parameter in model.parameters())
        2693194

    Reference:
        A. Dosovitskiy et al., An image is worth 16x16 words: transformers for image recognition at scale, ICLR 2021,
        https://arxiv.org/abs/2010.11929. There a class token is read, and one matrix gives query, key and value; here
        each is compressed by itself.
    """

    def __init__(
        self,
        *,
        layers: int = 6,
        heads: int = 6,
        width: int = 192,
        mlp_ratio: float = 4,
        image: int = 32,
        patch: int = 4,
        channels: int = 3,
        classes: int = 10,
    ) -> None:
        super().__init__()
        hidden = round(mlp_ratio * width)
        sizes = {"layers": layers, "heads": heads, "width": width, "mlp_ratio * width": hidden}
        sizes |= {"image": image, "patch": patch, "channels": channels, "classes": classes}
        for name, size in sizes.items():
            if size < 1:
                raise ValueError(f"ViT: {name} must be at least 1, got {size}.")
        for name, size, divisor, by in (("width", width, heads, "heads"), ("image", image, patch, "patch")):
            if size % divisor:
                raise ValueError(f"ViT: {name} must be a multiple of {by} = {divisor}, got {size}.")
        self.layers = layers
        self.heads = heads
        self.width = width
        self.hidden = hidden
        self.mlp_ratio = mlp_ratio
        self.image = image
        self.patch = patch
        self.channels = channels
        self.classes = classes
        self.patches = nn.Conv2d(channels, width, patch, stride=patch)
        self.positions = nn.Embedding((image // patch) ** 2, width)
        self.blocks = nn.Sequential(*(Block(width, heads, hidden) for _ in range(layers)))
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, classes)
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

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        features = self.patches(images).flatten(2).mT + self.positions.weight  # (N, patches, width), row after row
        features = self.norm(self.blocks(features))
        return self.head(features.mean(1))  # (N, classes)

    def narrower(self, parameters: int) -> "ViT":
        """Build a freshly initialised ViT with as many layers and heads and at most ``parameters`` parameters.

        The width is the largest multiple of ``heads`` that fits with MLPs in proportion; then the MLPs alone are
        widened while that fits, since one step of the width can be many percent. The result is deterministic and never
        wider than this network, which is also what a ``parameters`` beyond its own count gives.

        Args:
            parameters: Largest number of parameters allowed: weights, biases, positions and LayerNorms.

        Raises:
            ValueError: If not even one feature per head fits.

        Example:
            >>> model = ViT().narrower(300_000)
            >>> model.width, model.hidden, sum(parameter.numel() for parameter in model.parameters())
            (60, 279, 299704)
        """

        def count(width: int, hidden: int) -> int:
            shape = {"image": self.image, "patch": self.patch, "channels": self.channels, "classes": self.classes}
            return vit_parameters(layers=self.layers, width=width, hidden=hidden, **shape)

        def in_proportion(width: int) -> int:
            return max(1, round(self.mlp_ratio * width))

        widths = range(self.heads, self.width + 1, self.heads)
        fitting = bisect_right(widths, parameters, key=lambda width: count(width, in_proportion(width)))
        if fitting == 0:
            least = count(self.heads, in_proportion(self.heads))
            raise ValueError(f"ViT.narrower: parameters must be at least {least}, got {parameters}.")
        width = widths[fitting - 1]
        units = range(in_proportion(width), self.hidden + 1)
        hidden = units[bisect_right(units, parameters, key=lambda hidden: count(width, hidden)) - 1]
        return ViT(
            layers=self.layers,
            heads=self.heads,
            width=width,
            mlp_ratio=hidden / width,
            image=self.image,
            patch=self.patch,
            channels=self.channels,
            classes=self.classes,
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

    def __init__(self, width: int, heads: int, hidden: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm1 = nn.LayerNorm(width)
        self.query = nn.Linear(width, width)
        self.key = nn.Linear(width, width)
        self.value = nn.Linear(width, width)
        self.out = nn.Linear(width, width)
        self.norm2 = nn.LayerNorm(width)
        self.up = nn.Linear(width, hidden)
        self.down = nn.Linear(hidden, width)

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        features = features + self._attend(self.norm1(features))
        return features + self.down(functional.gelu(self.up(self.norm2(features))))

    def _attend(self, features: torch.Tensor) -> torch.Tensor:
        projections = (self.query(features), self.key(features), self.value(features))
        query, key, value = (p.unflatten(-1, (self.heads, -1)).transpose(-3, -2) for p in projections)
        mixed = functional.scaled_dot_product_attention(query, key, value)  # (N, heads, T, width / heads)
        return self.out(mixed.transpose(-3, -2).flatten(-2))  # (N, T, width)


def vit_parameters(
    *, layers: int, width: int, hidden: int, image: int = 32, patch: int = 4, channels: int = 3, classes: int = 10
) -> int:
    """Count the parameters of a `ViT` with ``hidden`` units in each MLP without building it.

    Example:
        >>> count = vit_parameters(layers=6, width=192, hidden=768)
        >>> count, count == sum(parameter.numel() for parameter in ViT().parameters())
        (2693194, True)
    """
    block = 4 * (width + 1) * width + (width + 1) * hidden + (hidden + 1) * width
    patches = (channels * patch**2 + 1) * width + (image // patch) ** 2 * width
    return patches + layers * block + (2 * layers + 1) * 2 * width + (width + 1) * classes
