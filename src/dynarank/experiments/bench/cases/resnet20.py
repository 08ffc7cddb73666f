"""ResNet-20 on images as large as those of CIFAR-10."""

from collections.abc import Sequence
from typing import final

from dynarank.experiments.bench.cases import base
from dynarank.models.resnet20 import ResNet20 as Network


@final
class ResNet20(base.AbstractCase):
    """ResNet-20, all convolutions but the first at a quarter of their largest rank, channels last, batches of 128."""

    def series(self) -> Sequence[base.Series]:
        return [
            base.Series(
                "batch 128",
                Network,
                (128, 3, 32, 32),
                base.classification,
                [base.part_of_channels(Network, 4)],
                channels_last=True,
                inference=(1, 16, 256),
            )
        ]
