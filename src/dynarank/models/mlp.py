"""A multilayer perceptron, and its narrower relatives of a given size."""

from bisect import bisect_right
from collections.abc import Sequence
from itertools import pairwise
from typing import final

import torch
from torch import nn
from torch.nn import functional


@final
class MLP(nn.Module):
    """Flatten, then linear layers with ReLU between them: ``fc1``, ``fc2``, ..., ``head``.

    Args:
        inputs: Features of one sample after flattening.
        hidden: Widths of the hidden layers, first to last.
        classes: Outputs of ``head``; logits, without softmax.

    Shape:
        - Input: ``(N, *)`` with ``inputs`` numbers per sample.
        - Output: ``(N, classes)``.

    Raises:
        ValueError: If a size is below 1, or if there is no hidden layer.

    Example:
        >>> model = MLP(784, [500, 500], 10)
        >>> model(torch.zeros(2, 1, 28, 28)).shape
        torch.Size([2, 10])
        >>> [name for name, _ in model.named_children()]
        ['fc1', 'fc2', 'head']
    """

    def __init__(self, inputs: int, hidden: Sequence[int], classes: int) -> None:
        super().__init__()
        if not hidden or min(inputs, *hidden, classes) < 1:
            got = f"{inputs}, {tuple(hidden)} and {classes}"
            raise ValueError(f"MLP: inputs, classes and one or more hidden widths must be at least 1, got {got}.")
        self.inputs = inputs
        self.hidden = tuple(hidden)
        self.classes = classes
        for index, (before, after) in enumerate(pairwise((inputs, *hidden)), start=1):
            self.add_module(f"fc{index}", nn.Linear(before, after))
        self.head = nn.Linear(hidden[-1], classes)

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        features = inputs.flatten(1)  # (N, inputs)
        for index in range(1, len(self.hidden) + 1):
            features = functional.relu(getattr(self, f"fc{index}")(features))  # (N, hidden[index - 1])
        return self.head(features)  # (N, classes)

    def narrower(self, parameters: int) -> "MLP":
        """Build a freshly initialised MLP of the same depth with at most ``parameters`` parameters, biases included.

        All hidden widths are scaled by one factor, the largest that fits, and rounded; then each layer, first to last,
        is widened by one where that still fits. The result is deterministic and never wider than this network, which
        is also what a ``parameters`` beyond its own count gives. The count comes within a few percent, except for very
        small networks, where one unit of ``fc1`` with its ``inputs + 1`` parameters is already more than that.

        Args:
            parameters: Largest number of parameters allowed, counting weights and biases.

        Raises:
            ValueError: If not even one unit per layer fits.

        Example:
            >>> model = MLP(784, [500, 500], 10).narrower(40_000)
            >>> model.hidden, sum(parameter.numel() for parameter in model.parameters())
            ((47, 48), 39689)
        """
        widest = max(self.hidden)

        def scaled(size: int) -> tuple[int, ...]:
            return tuple(max(1, round(width * size / widest)) for width in self.hidden)

        def count(hidden: tuple[int, ...]) -> int:
            return mlp_parameters(self.inputs, hidden, self.classes)

        size = bisect_right(range(1, widest + 1), parameters, key=lambda size: count(scaled(size)))
        if size == 0:
            raise ValueError(f"MLP.narrower: parameters must be at least {count(scaled(1))}, got {parameters}.")
        hidden = scaled(size)
        for layer, width in enumerate(self.hidden):
            wider = (*hidden[:layer], hidden[layer] + 1, *hidden[layer + 1 :])
            if hidden[layer] < width and count(wider) <= parameters:
                hidden = wider
        return MLP(self.inputs, hidden, self.classes)


def mlp_parameters(inputs: int, hidden: Sequence[int], classes: int) -> int:
    """Count weights and biases of ``MLP(inputs, hidden, classes)`` without building it.

    Example:
        >>> mlp_parameters(784, (500, 500), 10)
        648010
    """
    return sum((before + 1) * after for before, after in pairwise((inputs, *hidden, classes)))
