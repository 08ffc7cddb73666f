"""What a look at one layer finds out, as data."""

from dataclasses import dataclass
from typing import final

from dynarank import cost
from dynarank.stability.measures import (
    TOP,
    Directions,
    bulk,
    change,
    effective_rank,
    overlap,
    retained_energy,
    stability,
    stable_rank,
)

SHOWN = 48  # of a long spectrum so many singular values are kept in a look


@final
@dataclass(frozen=True)
class LayerLook:
    """What a look finds out about one layer. The first three are None where there is no earlier look to compare with.

    Args:
        stability: ``S`` of the polar factors since the look before, see `stability`.
        overlap: That of the leading directions, see `overlap`.
        change: ``||W - W_before||_F / ||W_before||_F``.
        shape: ``(m, n)`` of the weight as a matrix.
        rank: Its directions above rounding error.
        break_even: Largest rank at which two factors hold fewer numbers than the dense weight.
        stable_rank: ``||W||_F^2 / ||W||_2^2``.
        effective_rank: Exponential of the entropy of the singular values.
        retained_energy: Part of ``||W||_F^2`` within the rank, or within ``break_even`` where that is smaller.
        above_bulk: Singular values above those of noise; None where the weight has too few directions to show noise.
        bulk_level: Standard deviation of the entries of that noise, see `bulk`.
        bulk_threshold: What its largest singular value rarely exceeds.
        positions: Positions of the singular values below, from 1 on, ever sparser where there are many.
        singular_values: To six digits.
    """

    stability: float | None
    overlap: float | None
    change: float | None
    shape: tuple[int, int]
    rank: int
    break_even: int
    stable_rank: float
    effective_rank: float
    retained_energy: float
    above_bulk: int | None
    bulk_level: float
    bulk_threshold: float
    positions: tuple[int, ...]
    singular_values: tuple[float, ...]


def compare(before: Directions | None, after: Directions, *, top: int = TOP) -> LayerLook:
    """Return all measures of a layer, from its weight at two looks; ``before`` may be None or of another shape."""
    sigma, break_even = after.sigma.double().cpu(), cost.break_even_rank(*after.shape)
    before = before if before is not None and before.shape == after.shape else None
    noise, shown = bulk(sigma, after.shape), _shown(after.rank)
    return LayerLook(
        stability=None if before is None else stability(before, after),
        overlap=None if before is None else overlap(before, after, top=top),
        change=None if before is None else change(before, after),
        shape=after.shape,
        rank=after.rank,
        break_even=break_even,
        stable_rank=stable_rank(sigma),
        effective_rank=effective_rank(sigma),
        retained_energy=retained_energy(sigma, min(after.rank, break_even)),
        above_bulk=noise.above(sigma),
        bulk_level=noise.level,
        bulk_threshold=noise.threshold,
        positions=tuple(shown),
        singular_values=tuple(float(f"{sigma[position - 1]:.6g}") for position in shown),
    )


def _shown(count: int) -> list[int]:
    """Return positions from 1 to ``count``, the first and the last among them, at most SHOWN."""
    if count <= SHOWN:
        return list(range(1, count + 1))
    return sorted({1 + round((count - 1) * (step / (SHOWN - 1)) ** 2) for step in range(SHOWN)})
