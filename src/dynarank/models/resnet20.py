"""ResNet-20 for small images, and its narrower relatives of a given size."""

from collections.abc import Iterator, Sequence
from itertools import pairwise, product
from typing import final

import torch
from torch import nn
from torch.nn import functional

BLOCKS = 3  # per stage; two convolutions each, with stem and head 2 * 9 + 2 = 20 layers


@final
class ResNet20(nn.Module):
    """A 3 x 3 convolution, three stages of three residual blocks, the mean over pixels, a linear layer.

    The modules are ``stem``, ``norm``, ``stages.0.0.conv1``, ..., ``stages.2.2.norm2``, ``head``. The second and the
    third stage halve the side of the image. Convolutions have no bias; a BatchNorm follows each. The defaults have
    269,722 parameters and, with the running statistics, 271,117 numbers in their state dict.

    Args:
        widths: Channels of the three stages. No stage may be narrower than the one before it, since its shortcut copies
            every channel.
        classes: Outputs of ``head``; logits, without softmax.
        channels: Channels of the input images.

    Shape:
        - Input: ``(N, channels, height, width)``.
        - Output: ``(N, classes)``.

    Raises:
        ValueError: If a size is below 1, or if the widths are not three or decrease.

    Example:
        >>> model = ResNet20()
        >>> model(torch.zeros(2, 3, 32, 32)).shape
        torch.Size([2, 10])
        >>> sum(parameter.numel() for parameter in model.parameters())
        269722

    Reference:
        K. He, X. Zhang, S. Ren, J. Sun, Deep residual learning for image recognition, CVPR 2016,
        https://arxiv.org/abs/1512.03385, Section 4.2 with shortcuts of option A.
    """

    def __init__(self, widths: Sequence[int] = (16, 32, 64), *, classes: int = 10, channels: int = 3) -> None:
        super().__init__()
        if len(widths) != 3 or min(*widths, classes, channels) < 1:
            got = f"{tuple(widths)}, {classes} and {channels}"
            raise ValueError(f"ResNet20: three widths, classes and channels must be at least 1, got {got}.")
        if any(after < before for before, after in pairwise(widths)):
            raise ValueError(f"ResNet20: widths must not decrease, got {tuple(widths)}. Sort them.")
        self.widths = (widths[0], widths[1], widths[2])
        self.classes = classes
        self.channels = channels
        self.stem = _convolution(channels, widths[0])
        self.norm = nn.BatchNorm2d(widths[0])
        self.stages = nn.Sequential(
            _stage(widths[0], widths[0], stride=1),
            _stage(widths[0], widths[1], stride=2),
            _stage(widths[1], widths[2], stride=2),
        )
        self.head = nn.Linear(widths[2], classes)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        features = functional.relu(self.norm(self.stem(images)))  # (N, widths[0], 32, 32) for 32 x 32
        features = self.stages(features)  # (N, widths[2], 8, 8)
        return self.head(features.mean((2, 3)))  # (N, classes)

    def narrower(self, parameters: int) -> "ResNet20":
        """Build a freshly initialised ResNet20 with at most ``parameters`` numbers in its state dict.

        All widths are scaled by one factor and rounded down, and each may then move by one channel. Of all networks
        that arise so, none wider than this one, the result is the largest that fits; for the default widths it comes
        within 2 % from 16,000 up. It is deterministic; ``parameters`` beyond this network's own count give its own
        widths.

        Args:
            parameters: Largest count allowed: weights, biases, and the statistics of BatchNorm, which are stored too.

        Raises:
            ValueError: If not even one channel per stage fits.

        Example:
            >>> model = ResNet20().narrower(50_000)
            >>> model.widths, resnet20_parameters(model.widths)
            ((7, 12, 28), 49840)
        """

        def count(widths: tuple[int, ...]) -> int:
            return resnet20_parameters(widths, classes=self.classes, channels=self.channels)

        smallest = count((1, 1, 1))
        if parameters < smallest:
            raise ValueError(f"ResNet20.narrower: parameters must be at least {smallest}, got {parameters}.")
        fitting = (widths for widths in self._scaled() if count(widths) <= parameters)
        return ResNet20(max(fitting, key=count), classes=self.classes, channels=self.channels)

    def _scaled(self) -> Iterator[tuple[int, int, int]]:
        for size, moves in product(range(self.widths[2] + 1), product((-1, 0, 1), repeat=3)):
            scaled = (width * size // self.widths[2] + move for width, move in zip(self.widths, moves, strict=True))
            first, second, third = (min(max(1, s), width) for s, width in zip(scaled, self.widths, strict=True))
            if first <= second <= third:
                yield first, second, third


@final
class BasicBlock(nn.Module):
    """Two 3 x 3 convolutions with BatchNorm, ``conv1`` and ``conv2``, added to a shortcut without parameters.

    Args:
        inputs: Channels of the input.
        outputs: Channels of the result, at least ``inputs``.
        stride: Step of ``conv1`` and of the shortcut.

    Shape:
        - Input: ``(N, inputs, height, width)``.
        - Output: ``(N, outputs, ceil(height / stride), ceil(width / stride))``.

    Example:
        >>> BasicBlock(3, 7, stride=2)(torch.zeros(2, 3, 5, 8)).shape
        torch.Size([2, 7, 3, 4])
    """

    def __init__(self, inputs: int, outputs: int, *, stride: int = 1) -> None:
        super().__init__()
        self.stride = stride
        self.extra = outputs - inputs
        self.conv1 = _convolution(inputs, outputs, stride=stride)
        self.norm1 = nn.BatchNorm2d(outputs)
        self.conv2 = _convolution(outputs, outputs)
        self.norm2 = nn.BatchNorm2d(outputs)

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        residual = functional.relu(self.norm1(self.conv1(features)))  # (N, outputs, height / stride, width / stride)
        residual = self.norm2(self.conv2(residual))
        return functional.relu(residual + shortcut(features, stride=self.stride, extra=self.extra))


def shortcut(features: torch.Tensor, *, stride: int, extra: int) -> torch.Tensor:
    """Keep every ``stride``-th pixel in both directions and append ``extra`` channels of zeros.

    Example:
        >>> shortcut(torch.ones(2, 3, 5, 8), stride=2, extra=4).shape
        torch.Size([2, 7, 3, 4])
    """
    return functional.pad(features[:, :, ::stride, ::stride], (0, 0, 0, 0, 0, extra))


def resnet20_parameters(widths: Sequence[int], *, classes: int = 10, channels: int = 3) -> int:
    """Count the numbers in the state dict of ``ResNet20(widths, ...)`` without building it.

    Example:
        >>> resnet20_parameters((16, 32, 64)) == 269_722 + 2 * 688 + 19  # statistics of 688 channels, 19 batch counters
        True
    """
    outputs = (widths[0], *(width for width in widths for _ in range(2 * BLOCKS)))  # of every convolution in turn
    convolutions = sum(9 * before * after for before, after in pairwise((channels, *outputs)))
    norms = sum(4 * width + 1 for width in outputs)
    return convolutions + norms + (widths[2] + 1) * classes


def _stage(inputs: int, outputs: int, *, stride: int) -> nn.Sequential:
    rest = (BasicBlock(outputs, outputs) for _ in range(BLOCKS - 1))
    return nn.Sequential(BasicBlock(inputs, outputs, stride=stride), *rest)


def _convolution(inputs: int, outputs: int, *, stride: int = 1) -> nn.Conv2d:
    convolution = nn.Conv2d(inputs, outputs, 3, stride=stride, padding=1, bias=False)
    nn.init.kaiming_normal_(convolution.weight, nonlinearity="relu")
    return convolution
