"""Layers so small that Python weighs more than arithmetic."""

from collections.abc import Sequence
from functools import partial
from typing import final

from dynarank.experiments.bench.cases.base import AbstractCase, Series, classification
from dynarank.models.mlp import MLP

DEPTH, WIDTH, BATCH = 8, 64, 32


@final
class Tiny(AbstractCase):
    """Eight layers of 64 x 64 and a head, batches of 32: what a layer costs beyond its arithmetic."""

    def series(self) -> Sequence[Series]:
        return [
            Series(
                f"batch {BATCH}",
                partial(MLP, WIDTH, [WIDTH] * DEPTH, 10),
                (BATCH, WIDTH),
                classification,
                [{f"fc{index + 1}": rank for index in range(DEPTH)} for rank in (16, 8, 4)],
                inference=(1, 16, 256),
            )
        ]
