"""Small reference models with a width knob: every comparison carries a narrower dense network of equal size."""

import math
from collections.abc import Sequence
from typing import Any

from torch import nn

from dynarank.errors import unknown_name
from dynarank.models.forecaster import Forecaster
from dynarank.models.gpt import GPT
from dynarank.models.lenet5 import LeNet5
from dynarank.models.linear import LinearNetwork
from dynarank.models.mlp import MLP
from dynarank.models.resnet20 import ResNet20
from dynarank.models.vgg16 import VGG16
from dynarank.models.vit import ViT

__all__ = ["GPT", "MLP", "VGG16", "Forecaster", "LeNet5", "LinearNetwork", "ResNet20", "ViT", "build"]

NAMES = ("lenet5", "linear", "mlp")


def build(name: str, input_shape: Sequence[int], outputs: int, **options: Any) -> nn.Module:
    """Build a reference model for a data set, initialised by torch's global generator.

    Args:
        name: ``"mlp"``, four hidden layers of 500 unless ``hidden`` is given; ``"lenet5"`` or ``"linear"``.
        input_shape: Shape of one sample, without the batch dimension.
        outputs: Number of classes, or of regression targets per sample.
        **options: Passed on to the model: ``hidden`` of `MLP`, ``channels`` and ``hidden`` of `LeNet5`.

    Raises:
        ValueError: If the name is unknown, or if the model cannot take such samples.

    Example:
        >>> build("mlp", (1, 8, 8), 10, hidden=(32,))
        MLP(
          (fc1): Linear(in_features=64, out_features=32, bias=True)
          (head): Linear(in_features=32, out_features=10, bias=True)
        )
    """
    if name == "mlp":
        return MLP(math.prod(input_shape), **{"hidden": (500,) * 4, **options}, classes=outputs)
    if name == "linear":
        return LinearNetwork(math.prod(input_shape), outputs, **options)
    if name == "lenet5":
        if len(input_shape) != 3 or input_shape[0] != 1 or input_shape[1] != input_shape[2]:
            got = tuple(input_shape)
            raise ValueError(f"build: 'lenet5' takes samples of shape (1, side, side), got {got}. Use 'mlp' instead.")
        return LeNet5(classes=outputs, image=input_shape[1], **options)
    raise unknown_name("model", name, NAMES)
