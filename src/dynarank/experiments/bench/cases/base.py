"""What a case of the benchmark is: dense networks with a batch each, and the ranks they are compared at."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional


@dataclass(frozen=True)
class Series:
    """A dense network on a batch, and the ranks that it is compared at; all of them are timed in turn.

    Args:
        name: What it is called within its case.
        network: Makes the dense network, initialised by torch's global generator.
        inputs: Shape of a training batch, samples first.
        loss: Loss of the outputs.
        ranks: Ranks to compare: for each, the rank of every layer that is factorised, by name.
        inner: Whether the gradient of the inputs is computed too, as of a layer within a network.
        channels_last: Whether images and kernels are kept channels last.
        inference: Batch sizes for inference; none where another series has measured the same networks.
    """

    name: str
    network: Callable[[], nn.Module]
    inputs: tuple[int, ...]
    loss: Callable[[Tensor], Tensor]
    ranks: Sequence[Mapping[str, int]]
    inner: bool = False
    channels_last: bool = False
    inference: Sequence[int] = ()


@dataclass(frozen=True)
class Quoted:
    """A ratio that somebody else published. It was not measured here.

    Args:
        series: Name of the series that it belongs to.
        rank: As `rank_text` writes it.
        method: What was measured.
        to_dense: Time of a training step as a part of the dense one.
        source: Where it stands, and on what it was measured.
    """

    series: str
    rank: str
    method: str
    to_dense: float
    source: str


class AbstractCase(ABC):
    """Networks of one kind: one file in this folder, found by its name, or a Python file of the user."""

    quoted: ClassVar[Sequence[Quoted]] = ()  # shown beside what is measured

    @abstractmethod
    def series(self) -> Sequence[Series]:
        """Return what is measured, in the order of the table; no network is made yet."""


def rank_text(ranks: Mapping[str, int]) -> str:
    """Return the ranks of all layers as a table calls them: one number where they are equal.

    Example:
        >>> rank_text({"fc1": 8, "fc2": 8}), rank_text({"conv1": 10, "fc1": 60})
        ('8', '10, 60')
        >>> rank_text({"a": 4, "b": 4, "c": 8, "d": 16})
        '4 to 16'
    """
    different = list(dict.fromkeys(ranks.values()))
    if len(different) > 1 and len(ranks) > 3:
        return f"{min(different)} to {max(different)}"
    return ", ".join(map(str, ranks.values() if len(different) > 1 else different))


def classification(outputs: Tensor) -> Tensor:
    """Return the cross entropy of logits ``(N, classes)`` against classes that come in turn."""
    targets = torch.arange(len(outputs), device=outputs.device) % outputs.shape[1]
    return functional.cross_entropy(outputs, targets)


def mean_square(outputs: Tensor) -> Tensor:
    """Return the mean of the squares: a loss that costs next to nothing."""
    return outputs.square().mean()


def part_of_channels(network: Callable[[], Any], part: int) -> dict[str, int]:
    """Return for every convolution but the first a ``part``-th of its largest rank, by name.

    Example:
        >>> net = lambda: nn.Sequential(nn.Conv2d(3, 16, 3), nn.Conv2d(16, 32, 3))
        >>> part_of_channels(net, 4)
        {'1': 8}
    """
    with torch.device("meta"):
        model = network()
    convolutions = {name: layer for name, layer in model.named_modules() if isinstance(layer, nn.Conv2d)}
    weights = {name: layer.weight.flatten(1).shape for name, layer in list(convolutions.items())[1:]}
    return {name: max(1, min(shape) // part) for name, shape in weights.items()}
