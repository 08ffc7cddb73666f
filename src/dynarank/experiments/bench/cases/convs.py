"""Convolutions alone, by channels and rank."""

from collections.abc import Sequence
from functools import partial
from typing import final

from torch import nn

from dynarank.experiments.bench.cases.base import AbstractCase, Series, mean_square

GRID = {64: (32, 16), 128: (16, 32), 256: (8, 64), 512: (4, 64)}  # channels: side of the images, batch


@final
class Convs(AbstractCase):
    """Single 3x3 convolutions, as many channels in as out, channels last, at a quarter and an eighth of the rank."""

    def series(self) -> Sequence[Series]:
        return [
            Series(
                f"{channels} channels, {batch} of {side} x {side}",
                partial(_convolution, channels),
                (batch, channels, side, side),
                mean_square,
                [{"0": channels // 4}, {"0": channels // 8}],
                inner=True,
                channels_last=True,
                inference=(1, 16, 256),
            )
            for channels, (side, batch) in GRID.items()
        ]


def _convolution(channels: int) -> nn.Module:
    return nn.Sequential(nn.Conv2d(channels, channels, 3, padding=1))
