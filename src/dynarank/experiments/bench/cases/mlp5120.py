"""The widest network of linear layers, for which others have published times."""

from collections.abc import Sequence
from functools import partial
from typing import ClassVar, final

from dynarank.experiments.bench.cases.base import AbstractCase, Quoted, Series, classification
from dynarank.models.mlp import MLP

LAYERS = ("fc1", "fc2", "fc3", "fc4")
NAME = "batch 256"
PUBLISHED = {40: 0.42, 160: 1.21, 320: 2.67}
SOURCE = (
    "from time files that the authors committed beside their TensorFlow code, on their machine and at width 5120; "
    "nothing of it was measured here"
)


@final
class MLP5120(AbstractCase):
    """784-5120-5120-5120-5120-10, all but the last layer at rank 40, 160 and 320, batches of 256.

    Reference:
        Schotthöfer et al., "Low-rank lottery tickets", NeurIPS 2022, https://arxiv.org/abs/2205.13571, whose authors
        published the ratios that are quoted beside what is measured.
    """

    quoted: ClassVar[Sequence[Quoted]] = tuple(
        Quoted(NAME, str(rank), "fixed-rank KLS", ratio, SOURCE) for rank, ratio in PUBLISHED.items()
    )

    def series(self) -> Sequence[Series]:
        return [
            Series(
                NAME,
                partial(MLP, 784, [5120] * 4, 10),
                (256, 784),
                classification,
                [dict.fromkeys(LAYERS, rank) for rank in PUBLISHED],
                inference=(1, 16, 256),
            )
        ]
