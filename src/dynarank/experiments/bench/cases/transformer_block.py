"""A transformer block, by width, rank and tokens."""

from collections.abc import Sequence
from functools import partial
from typing import final

from torch import nn

from dynarank.experiments.bench.cases.base import AbstractCase, Series, mean_square
from dynarank.models.vit import Block

LENGTH, HEAD = 128, 64  # tokens of a sequence, width of a head
LAYERS = ("query", "key", "value", "out", "up", "down")


@final
class TransformerBlock(AbstractCase):
    """Self-attention and an MLP of four times the width, all six weights factorised, on 256 and on 4096 tokens."""

    def series(self) -> Sequence[Series]:
        return [
            Series(
                f"width {width}, {rows} rows",
                partial(_block, width),
                (rows // LENGTH, LENGTH, width),
                mean_square,
                [dict.fromkeys(LAYERS, width // part) for part in (4, 8)],
                inner=True,
                inference=(1, 16) if rows == 256 else (),
            )
            for width in (512, 1024)
            for rows in (256, 4096)
        ]


def _block(width: int) -> nn.Module:
    return Block(width, width // HEAD, 4 * width)
