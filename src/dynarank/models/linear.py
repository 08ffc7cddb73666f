"""One matrix: the student of a planted linear teacher."""

from typing import final

import torch
from torch import nn


@final
class LinearNetwork(nn.Module):
    """``y = W x`` with a single weight and no bias, in the layer ``fc``.

    It has no width: a narrower dense network of equal size does not exist.

    Args:
        inputs: Features of one sample after flattening.
        outputs: Features of the result.

    Shape:
        - Input: ``(N, *)`` with ``inputs`` numbers per sample.
        - Output: ``(N, outputs)``.

    Raises:
        ValueError: If a size is below 1.

    Example:
        >>> LinearNetwork(7, 5)(torch.zeros(2, 7)).shape
        torch.Size([2, 5])
    """

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        if min(inputs, outputs) < 1:
            raise ValueError(f"LinearNetwork: inputs and outputs must be at least 1, got {inputs} and {outputs}.")
        self.inputs = inputs
        self.outputs = outputs
        self.fc = nn.Linear(inputs, outputs, bias=False)

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        return self.fc(inputs.flatten(1))  # (N, outputs)
