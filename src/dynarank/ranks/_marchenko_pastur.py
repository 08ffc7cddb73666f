"""The singular values of pure noise: what a random matrix of a given shape shows."""

from functools import lru_cache
from math import pi, sqrt

import torch
from torch import Tensor

POINTS = 4096  # of the integral; the quantiles are exact to about 1 / POINTS of the width of the bulk


def edge(rows: int, columns: int) -> float:
    """Return the largest singular value of a large ``(rows, columns)`` matrix of noise with variance 1.

    Example:
        >>> edge(64, 36)
        14.0
    """
    return sqrt(rows) + sqrt(columns)


@lru_cache(maxsize=4096)
def spectrum(rows: int, columns: int) -> Tensor:
    """Return the singular values to expect of a ``(rows, columns)`` matrix of noise with variance 1, descending.

    They are the quantiles of the Marchenko-Pastur law at ``(j - 1/2) / min(rows, columns)``.

    Shape:
        ``(min(rows, columns),)``, float64 on the CPU.

    Example:
        >>> [round(value, 1) for value in spectrum(4, 100).tolist()]
        [11.2, 10.3, 9.5, 8.7]

    Reference:
        Marchenko, Pastur, "Distribution of eigenvalues for some sets of random matrices", Math. USSR-Sbornik 1967.
    """
    count, longer = sorted((rows, columns))
    # Eigenvalues of the Gram matrix are middle - reach cos(t); in t the density is smooth up to both edges.
    middle, reach = float(longer + count), 2 * sqrt(longer * count)
    t = torch.linspace(0, pi, POINTS + 1, dtype=torch.float64)
    t = (t[1:] + t[:-1]) / 2
    eigenvalues = middle - reach * t.cos()
    mass = (t.sin().square() / eigenvalues).cumsum(0)
    wanted = mass[-1] * (1 - (torch.arange(count, dtype=torch.float64) + 0.5) / count)
    return eigenvalues[torch.searchsorted(mass, wanted).clamp_max(POINTS - 1)].sqrt()
