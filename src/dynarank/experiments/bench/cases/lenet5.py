"""LeNet5 on images as large as those of MNIST."""

from collections.abc import Sequence
from typing import final

from dynarank.experiments.bench.cases import base
from dynarank.models.lenet5 import LeNet5 as Network

RANKS = {"conv1": 10, "conv2": 25, "fc1": 60}


@final
class LeNet5(base.AbstractCase):
    """LeNet5, two convolutions and a linear layer at ranks 10, 25 and 60, batches of 128."""

    def series(self) -> Sequence[base.Series]:
        inputs = (128, 1, 28, 28)
        return [base.Series("batch 128", Network, inputs, base.classification, [RANKS], inference=(1, 16, 256))]
