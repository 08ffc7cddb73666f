"""Whether the copies of a model are equal: to the last bit, and if not, how far apart they are."""

import math
import zlib
from collections.abc import Iterable, Mapping

import torch
from torch import Tensor

from dynarank.distributed._channel import OWN, Channel
from dynarank.factors import FactorPair
from dynarank.layers._factored import AbstractFactoredLayer, Point


def crc(lines: Iterable[object]) -> int:
    """Return a number that tells texts apart."""
    return zlib.crc32("\n".join(map(str, lines)).encode())


def same(column: Tensor) -> bool:
    """Whether all processes sent the same number."""
    return bool((column == column[0]).all())


def moment(step: int, names: Iterable[str]) -> list[int]:
    """Return what all processes must have in common before they talk about anything else."""
    return [step, crc(names)]


def check_moments(channel: Channel, where: str, rows: Tensor, names: Iterable[str]) -> None:
    """Raise unless the ``moment`` in the first two columns of ``rows`` is the same on every process.

    Raises:
        RuntimeError: The processes are at different steps or have different layers.
    """
    if not same(rows[:, 0]):
        raise RuntimeError(
            f"the processes have taken different numbers of optimizer steps: {rows[:, 0].tolist()}. "
            "A step must be taken or skipped by all of them."
        )
    if not same(rows[:, 1]):
        told = channel.gather_objects(where, list(names))
        common = set.intersection(*map(set, told))
        others = [[name for name in mine if name not in common] for mine in told]
        raise RuntimeError(
            f"the processes drive different low-rank layers: {len(common)} are common, beside them the processes have "
            f"{others}. Factorise the same model in the same way on every process. {OWN}"
        )


def layout(layer: AbstractFactoredLayer, tensors: Iterable[Tensor]) -> str:
    """Return what must agree before tensors can be compared or copied."""
    shapes = [tuple(t.shape) for t in tensors]
    return f"rank {layer.rank} of {layer.capacity} in {layer.form} form with shapes {shapes}"


def raise_for_layouts(channel: Channel, where: str, layouts: Mapping[str, str]) -> None:
    """Name the first layer whose layout differs.

    Raises:
        RuntimeError: Always.
    """
    told = channel.gather_objects(where, dict(layouts))
    name = next(name for name in layouts if len({mine[name] for mine in told}) > 1)
    raise RuntimeError(
        f"ranks, forms or optimizer state differ between processes for layer {name}: {[mine[name] for mine in told]}. "
        "Every process must load the same checkpoint."
    )


def checksum(tensors: Iterable[Tensor]) -> int:
    """Return a number that differs, for all practical purposes, where one bit or the order of the entries does.

    Example:
        >>> checksum([torch.tensor([1.0, 2.0])]) == checksum([torch.tensor([2.0, 1.0])])
        False
    """
    check = 0
    for tensor in tensors:
        bits = tensor.detach().contiguous().flatten()
        bits = bits.view(torch.int16 if bits.element_size() % 2 == 0 else torch.uint8)
        for part in bits.split(1 << 22):  # in parts, to bound the memory of the products in int64
            place = torch.arange(1, part.numel() + 1, device=part.device) % 65521
            check = (31 * check + int((part * place).sum())) % (1 << 61)
    return check


def relative_distance(one: Point, other: Point) -> float:
    """Return ``||W1 - W2||_F / ||W2||_F`` from the small Gram matrices of the factors, in float64.

    Example:
        >>> pair = FactorPair(torch.ones(1, 3), torch.ones(1, 2))
        >>> relative_distance(FactorPair(1.5 * pair.A, pair.B), pair)
        0.5
    """
    (L1, R1), (L2, R2) = _sides(one), _sides(other)
    size = ((L2.mT @ L2) * (R2 @ R2.mT)).sum()
    squared = ((L1.mT @ L1) * (R1 @ R1.mT)).sum() - 2 * ((L1.mT @ L2) * (R1 @ R2.mT)).sum() + size
    return math.sqrt(max(float(squared), 0.0) / max(float(size), torch.finfo(torch.float64).tiny))


def _sides(point: Point) -> tuple[Tensor, Tensor]:
    """Return ``left (m, r)`` and ``right (r, n)`` with ``W = left right``."""
    if isinstance(point, FactorPair):
        return point.A.mT.double(), point.B.double()
    return point.U.double() @ point.S.double(), point.V.mT.double()
