"""Linear layers alone, by width, rank and rows."""

from collections.abc import Sequence
from functools import partial
from typing import final

from torch import nn

from dynarank.experiments.bench.cases.base import AbstractCase, Series, mean_square

# Outputs, inputs, rows, ranks. Few rows at large ranks are where upkeep weighs most, many rows where it does not.
GRID = (
    (512, 512, 32, (128, 64, 16)),
    (512, 512, 256, (128, 64, 16)),
    (512, 512, 4096, (128, 64)),
    (2048, 512, 256, (128, 64, 16)),
    (1024, 1024, 256, (256, 128, 32)),
    (2048, 2048, 32, (512, 256, 64)),
    (2048, 2048, 256, (512, 256, 64)),
    (1280, 5120, 256, (320, 160)),
    (5120, 5120, 256, (640, 160)),
)


@final
class Layers(AbstractCase):
    """Single linear layers, square and 4:1, with the gradient of their inputs: by width, rank and rows."""

    def series(self) -> Sequence[Series]:
        return [
            Series(
                f"{m} x {n}, {rows} rows",
                partial(_layer, m, n),
                (rows, n),
                mean_square,
                [{"0": rank} for rank in ranks],
                inner=True,
                inference=(1, 16, 256) if rows == 256 else (),
            )
            for m, n, rows, ranks in GRID
        ]


def _layer(m: int, n: int) -> nn.Module:
    return nn.Sequential(nn.Linear(n, m))
