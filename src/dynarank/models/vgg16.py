"""VGG-16 for small images, and its narrower relatives of a given size."""

from bisect import bisect_right
from collections.abc import Sequence
from itertools import pairwise
from typing import final

import torch
from torch import nn

DEPTHS = (2, 2, 3, 3, 3)  # convolutions of each stage, 13 in all
SIDE = 2 ** len(DEPTHS)  # the smallest image of which the stages leave a pixel


@final
class VGG16(nn.Module):
    """Five stages of 3 x 3 convolutions, each halving the image by max-pooling, and a linear layer.

    The convolutions are ``stages.0.0``, ``stages.0.3``, ``stages.1.0``, ...; a BatchNorm and a ReLU follow each, and
    they have no bias. The layer ``head`` reads the mean over pixels, of which a 32 x 32 image leaves one. The defaults
    have 14,724,042 parameters and, with the running statistics, 14,732,503 numbers in their state dict.

    Args:
        widths: Channels of the five stages.
        classes: Outputs of ``head``; logits, without softmax.
        channels: Channels of the input images.

    Shape:
        - Input: ``(N, channels, height, width)``, both sides at least 32.
        - Output: ``(N, classes)``.

    Raises:
        ValueError: If a size is below 1, if the widths are not five, or if an image is too small.

    Example:
        >>> model = VGG16()
        >>> model(torch.zeros(2, 3, 32, 32)).shape
        torch.Size([2, 10])
        >>> sum(parameter.numel() for parameter in model.parameters())
        14724042

    Reference:
        K. Simonyan, A. Zisserman, Very deep convolutional networks for large-scale image recognition, ICLR 2015,
        https://arxiv.org/abs/1409.1556, column D. There two layers of 4096 units stand before the last one, and there
        is no BatchNorm; without the first and with the second it is what the literature trains on CIFAR.
    """

    def __init__(
        self, widths: Sequence[int] = (64, 128, 256, 512, 512), *, classes: int = 10, channels: int = 3
    ) -> None:
        super().__init__()
        if len(widths) != len(DEPTHS) or min(*widths, classes, channels) < 1:
            got = f"{tuple(widths)}, {classes} and {channels}"
            raise ValueError(f"VGG16: five widths, classes and channels must be at least 1, got {got}.")
        self.widths = tuple(widths)
        self.classes = classes
        self.channels = channels
        stages = zip(pairwise((channels, *widths)), DEPTHS, strict=True)
        self.stages = nn.Sequential(*(_stage(before, after, depth=depth) for (before, after), depth in stages))
        self.head = nn.Linear(widths[-1], classes)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        if min(images.shape[-2:]) < SIDE:
            raise ValueError(f"VGG16: both sides of an image must be at least {SIDE}, got {tuple(images.shape[-2:])}.")
        features = self.stages(images)  # (N, widths[4], height // 32, width // 32)
        return self.head(features.mean((2, 3)))  # (N, classes)

    def narrower(self, parameters: int) -> "VGG16":
        """Build a freshly initialised VGG16 with at most ``parameters`` numbers in its state dict.

        All widths are scaled by one factor, the largest that fits, and rounded; then each stage, last to first, is
        widened by one channel where that still fits. The result is deterministic and never wider than this network,
        which is also what a ``parameters`` beyond its own count gives.

        Args:
            parameters: Largest count allowed: weights, biases, and the statistics of BatchNorm, which are stored too.

        Raises:
            ValueError: If not even one channel per stage fits.

        Example:
            >>> model = VGG16().narrower(1_000_000)
            >>> model.widths, vgg16_parameters(model.widths)
            ((18, 34, 66, 133, 133), 998678)
        """
        widest = max(self.widths)

        def scaled(size: int) -> tuple[int, ...]:
            return tuple(max(1, round(width * size / widest)) for width in self.widths)

        def count(widths: Sequence[int]) -> int:
            return vgg16_parameters(widths, classes=self.classes, channels=self.channels)

        size = bisect_right(range(1, widest + 1), parameters, key=lambda size: count(scaled(size)))
        if size == 0:
            raise ValueError(f"VGG16.narrower: parameters must be at least {count(scaled(1))}, got {parameters}.")
        widths = scaled(size)
        for stage in reversed(range(len(widths))):
            wider = (*widths[:stage], widths[stage] + 1, *widths[stage + 1 :])
            if widths[stage] < self.widths[stage] and count(wider) <= parameters:
                widths = wider
        return VGG16(widths, classes=self.classes, channels=self.channels)


def vgg16_parameters(widths: Sequence[int], *, classes: int = 10, channels: int = 3) -> int:
    """Count the numbers in the state dict of ``VGG16(widths, ...)`` without building it.

    Example:
        >>> vgg16_parameters((64, 128, 256, 512, 512)) == 14_724_042 + 2 * 4224 + 13  # statistics and batch counters
        True
    """
    outputs = [width for width, depth in zip(widths, DEPTHS, strict=True) for _ in range(depth)]
    convolutions = sum(9 * before * after for before, after in pairwise((channels, *outputs)))
    return convolutions + sum(4 * width + 1 for width in outputs) + (widths[-1] + 1) * classes


def _stage(inputs: int, outputs: int, *, depth: int) -> nn.Sequential:
    layers: list[nn.Module] = []
    for before in (inputs, *(outputs,) * (depth - 1)):
        convolution = nn.Conv2d(before, outputs, 3, padding=1, bias=False)
        nn.init.kaiming_normal_(convolution.weight, nonlinearity="relu")
        layers += [convolution, nn.BatchNorm2d(outputs), nn.ReLU()]
    return nn.Sequential(*layers, nn.MaxPool2d(2))
