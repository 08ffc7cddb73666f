"""Which part of its ranks a network trains with in one step, drawn anew in each."""

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from typing import final

import torch

from dynarank.elastic._active import Ranks, check_fraction, fraction_of


class AbstractWidths(ABC):
    """Draws the ranks of one training step."""

    @abstractmethod
    def draw(self, ranks: Mapping[str, int], generator: torch.Generator) -> Ranks:
        """Return the number of leading directions by layer; layers that are left out keep all of theirs.

        Args:
            ranks: Rank of each layer.
            generator: Where chance comes from.
        """


@final
@dataclass(frozen=True)
class Fractions(AbstractWidths):
    """The same fraction of the rank in every layer, each of a few with the same probability.

    Args:
        values: Fractions of the ranks, above 0 and at most 1.

    Raises:
        ValueError: There is no fraction, or one is out of range.

    Example:
        >>> Fractions((0.25,)).draw({"fc1": 16, "fc2": 3}, torch.Generator())
        {'fc1': 4, 'fc2': 1}

    Reference:
        J. Yu, L. Yang, N. Xu, J. Yang, T. Huang, "Slimmable neural networks", ICLR 2019,
        https://arxiv.org/abs/1812.08928; there a width is a part of the channels, here of the singular directions.
    """

    values: tuple[float, ...] = (0.125, 0.25, 0.5)

    def __post_init__(self) -> None:
        if not self.values:
            raise ValueError("Fractions: at least one fraction of the ranks is needed, got none.")
        for value in self.values:
            check_fraction(value, owner="Fractions")

    def draw(self, ranks: Mapping[str, int], generator: torch.Generator) -> Ranks:
        return fraction_of(ranks, self.values[_below(len(self.values), generator)])


@final
@dataclass(frozen=True)
class OneLayer(AbstractWidths):
    """A random rank in one layer, all others whole: every pair of a layer and a rank has the same probability.

    Example:
        >>> len(OneLayer().draw({"fc1": 16, "fc2": 3}, torch.Generator()))
        1

    Reference:
        S. Horváth, S. Laskaridis, S. Rajput, H. Wang, "Maestro: uncovering low-rank structures via trainable
        decomposition", ICML 2024, https://arxiv.org/abs/2308.14929.
    """

    def draw(self, ranks: Mapping[str, int], generator: torch.Generator) -> Ranks:
        pairs = [(name, rank) for name, full in ranks.items() for rank in range(1, full + 1)]
        name, rank = pairs[_below(len(pairs), generator)]
        return {name: rank}


def _below(count: int, generator: torch.Generator) -> int:
    return int(torch.randint(count, (), generator=generator, device=generator.device))
