"""What a layer would become: the class of its twin, the sizes its ranks are counted against, and what they cost."""

from collections.abc import Sequence
from dataclasses import dataclass
from math import prod
from typing import Any, Literal, get_args

from torch import nn

from dynarank import cost, tucker
from dynarank.factorize._sites import Site
from dynarank.layers.conv2d_spatial import LowRankSpatialConv2d
from dynarank.layers.conv2d_tucker import LowRankTuckerConv2d

ConvForm = Literal["matrix", "spatial", "tucker", "tucker4"]
CONV_FORMS = get_args(ConvForm)


@dataclass(frozen=True)
class Target:
    """The twin of one layer.

    Args:
        kind: File name of the twin, such as ``"conv2d"``.
        twin: Its class.
        shape: ``(m, n)`` of the weight as a matrix.
        weight: Shape of the weight; empty where only the matrix counts.
        modes: How many modes of the weight have a rank, from the first on; 0 for a matrix.
        note: Why it has not the form that was asked for; empty otherwise.
    """

    kind: str
    twin: Any
    shape: tuple[int, int]
    weight: tuple[int, ...] = ()
    modes: int = 0
    note: str = ""

    @property
    def entries(self) -> int:
        """Numbers in the dense weight."""
        return prod(self.shape)

    def mode_ranks(self, value: int | float | str) -> tuple[int, ...]:
        """Return a rank for each mode: a fraction of its size, at most an integer, or as large as can be."""
        sizes = self.weight[: self.modes]
        if value == "full":
            wanted = sizes
        elif isinstance(value, float):
            least = 1 if self.modes == 2 else 2  # four ranks of 1 could never grow: none exceeds the others' product
            wanted = [min(size, max(least, round(value * size))) for size in sizes]
        else:
            wanted = [min(int(value), size) for size in sizes]
        ranks = tucker.lowered(self.weight, (*wanted, *[None] * (len(self.weight) - self.modes)))
        return tuple(rank for rank in ranks if rank is not None)

    def numbers(self, ranks: Sequence[int], *, multiple: int = 1) -> int:
        """Return the entries of all factors of these ranks, stored in multiples of so many rows."""
        if not self.modes:
            return cost.factor_parameters(*self.shape, min(cost.round_up(ranks[0], multiple), min(self.shape)))
        sizes = self.weight[: self.modes]
        stored = [min(cost.round_up(rank, multiple), size) for rank, size in zip(ranks, sizes, strict=True)]
        bases = sum(rank * size for rank, size in zip(stored, sizes, strict=True))
        return prod(stored) * prod(self.weight[self.modes :]) + bases

    def build(self, dense: nn.Module, ranks: Sequence[int], *, rank_multiple: int) -> Any:
        """Return the low-rank twin of a dense layer."""
        which = {"ranks": ranks} if self.modes else {"rank": ranks[0]}
        return self.twin.from_dense(dense, **which, rank_multiple=rank_multiple)


def target_of(site: Site, conv_form: ConvForm) -> Target:
    """Return what a layer would become. Only 2-dimensional convolutions with a real kernel have a choice."""
    weight = tuple(site.module.weight.shape)
    rows, columns = weight[0], prod(weight[1:])
    matrix = Target(site.kind, site.twin, (rows, columns))
    if conv_form == "matrix" or not site.kind.startswith("conv"):
        return matrix
    if site.kind != "conv2d":
        return Target(site.kind, site.twin, (rows, columns), note=f"a matrix: only nn.Conv2d has the form {conv_form}")
    outputs, inputs, height, width = weight
    if height == width == 1:
        return Target(site.kind, site.twin, (rows, columns), note="a matrix: its kernel is 1x1")
    if conv_form == "spatial":
        return Target("conv2d_spatial", LowRankSpatialConv2d, (outputs * width, inputs * height))
    modes = 2 if conv_form == "tucker" else 4
    return Target("conv2d_tucker", LowRankTuckerConv2d, (rows, columns), weight, modes)
