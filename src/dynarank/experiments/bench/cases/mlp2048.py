"""A wide network of linear layers."""

from collections.abc import Sequence
from functools import partial
from typing import final

from dynarank.experiments.bench.cases.base import AbstractCase, Series, classification
from dynarank.models.mlp import MLP

LAYERS = ("fc1", "fc2", "fc3", "fc4")


@final
class MLP2048(AbstractCase):
    """784-2048-2048-2048-2048-10, all but the last layer at rank 64, 160 and 320, batches of 256."""

    def series(self) -> Sequence[Series]:
        return [
            Series(
                "batch 256",
                partial(MLP, 784, [2048] * 4, 10),
                (256, 784),
                classification,
                [dict.fromkeys(LAYERS, rank) for rank in (64, 160, 320)],
                inference=(1, 16, 256),
            )
        ]
