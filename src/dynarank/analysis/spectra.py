"""The spectrum of a weight: how its singular values decay, and which of them pure noise would have as well."""

from collections.abc import Sequence
from dataclasses import dataclass
from math import sqrt

import torch
from torch import Tensor

from dynarank import linalg
from dynarank.compress.timing import interpolated
from dynarank.ranks import _marchenko_pastur
from dynarank.stability import bulk, effective_rank, stable_rank

RESOLUTION = 1e-8  # of the largest singular value: what is smaller drowns in the rounding of the Gram matrix
POINTS = 256  # of a long spectrum so many are kept
BLOCK = 2**24  # numbers widened to float64 at a time: 128 MiB


@dataclass(frozen=True)
class NoiseBulk:
    """The singular values that a matrix of independent entries would have, of the level found in a weight.

    Trained weights have heavier tails than this, so what lies above is a guide and no proof.

    Args:
        level: Standard deviation of the entries; 0 where half of the singular values vanish and nothing can be told.
        lower: Smallest singular value of the noise as the matrix grows.
        upper: Its largest one.
        threshold: What the largest one of noise of this size rarely exceeds, a little above ``upper``.
        above: Number of singular values of the weight above the threshold.
    """

    level: float
    lower: float
    upper: float
    threshold: float
    above: int


@dataclass(frozen=True)
class Spectrum:
    """The singular values of a weight, all of them or, of many, ever sparser ones.

    Args:
        ranks: Their positions, from 1 on.
        singular_values: Falling; exact to about 1e-8 of the largest.
        errors: ``||W - W_r||_F^2 / ||W||_F^2`` of the best approximation of each of these ranks.
        rank_90: Smallest rank that keeps 90 % of ``||W||_F^2``.
        rank_95: The same for 95 %.
        rank_99: The same for 99 %.
        stable_rank: ``||W||_F^2 / ||W||_2^2``.
        effective_rank: Exponential of the entropy of the singular values, normalised to sum 1.
        noise: The singular values that noise would have.

    Reference:
        Roy, Vetterli, "The effective rank: a measure of effective dimensionality", EUSIPCO 2007.
    """

    ranks: tuple[int, ...]
    singular_values: tuple[float, ...]
    errors: tuple[float, ...]
    rank_90: int
    rank_95: int
    rank_99: int
    stable_rank: float
    effective_rank: float
    noise: NoiseBulk


@torch.no_grad()
def singular_values(weight: Tensor) -> Tensor:
    """Return the singular values of a weight, from the eigenvalues of its smaller Gram matrix in float64.

    That is several times faster than an SVD and takes little memory beside the weight; what is below about 1e-8 of
    the largest value is not resolved.

    Shape:
        ``(m, *)``, everything after the first dimension is one; the result is ``(min(m, n),)`` float64, falling.

    Raises:
        ValueError: The weight holds NaN or infinity.

    Example:
        >>> [round(sigma, 6) for sigma in singular_values(torch.tensor([[3.0, 0.0], [0.0, 4.0], [0.0, 0.0]])).tolist()]
        [4.0, 3.0]
    """
    W = weight.detach().as_subclass(Tensor).flatten(1)
    W = W.mT if W.shape[0] > W.shape[1] else W  # (k, n) with k <= n
    peak = W.abs().amax().double()
    if not bool(peak.isfinite()):
        raise ValueError(
            f"singular_values needs finite entries, got NaN or infinity in a {tuple(weight.shape)} weight."
        )
    peak = peak.clamp_min(torch.finfo(torch.float64).tiny)  # the squares must not overflow
    gram = torch.zeros(len(W), len(W), dtype=torch.float64, device=W.device)
    for block in W.split(max(1, BLOCK // len(W)), dim=1):
        scaled = block.double() / peak
        gram.addmm_(scaled, scaled.mT)
    return torch.linalg.eigvalsh(gram).flip(0).clamp_min(0).sqrt() * peak


def describe(sigma: Tensor, shape: tuple[int, int]) -> Spectrum:
    """Return what there is to know about a spectrum.

    Args:
        sigma: All singular values, falling.
        shape: ``(m, n)`` of the weight.

    Example:
        >>> found = describe(torch.tensor([4.0, 2.0, 2.0, 1.0], dtype=torch.float64), (4, 6))
        >>> found.rank_90, found.rank_99, found.stable_rank, round(found.effective_rank, 2)
        (3, 4, 1.5625, 3.57)
    """
    errors = truncation_errors(sigma)
    kept = thinned(len(sigma))
    levels = [int((errors > 1 - level).sum()) if float(sigma[0]) else 0 for level in (0.9, 0.95, 0.99)]
    return Spectrum(
        tuple(index + 1 for index in kept),
        tuple(sigma[kept].tolist()),
        tuple(errors[[index + 1 for index in kept]].tolist()),
        *levels,
        stable_rank=stable_rank(sigma),
        effective_rank=effective_rank(sigma),
        noise=fit_noise(sigma, shape),
    )


def truncation_errors(sigma: Tensor) -> Tensor:
    """Return the relative squared error of truncating to rank 0, 1, ..., k; 0 throughout for a weight of zeros.

    Example:
        >>> [round(error, 6) for error in truncation_errors(torch.tensor([2.0, 1.0])).tolist()]
        [1.0, 0.2, 0.0]
    """
    tails = linalg.tails(sigma)
    return (tails / tails[0]).square() if float(tails[0]) else tails


def thinned(count: int, *, limit: int = POINTS) -> list[int]:
    """Return at most ``limit`` of the indices below ``count``, the first and the last among them, ever sparser.

    Example:
        >>> thinned(100, limit=8)
        [0, 1, 3, 6, 13, 26, 51, 99]
    """
    if count <= limit:
        return list(range(count))
    return sorted({round(count ** (step / (limit - 1))) - 1 for step in range(limit)})


# --- noise -------------------------------------------------------------------------------------------------------


def fit_noise(sigma: Tensor, shape: tuple[int, int]) -> NoiseBulk:
    """Return the noise whose median singular value is that of a spectrum: `bulk`, with the edges of its spectrum.

    Args:
        sigma: All singular values, falling.
        shape: ``(m, n)`` of the weight.

    Example:
        >>> _ = torch.manual_seed(1)
        >>> found = fit_noise(singular_values(0.1 * torch.randn(300, 200)), (300, 200))
        >>> round(found.level, 2), round(found.lower, 2), round(found.upper, 2), found.above
        (0.1, 0.32, 3.15, 0)
    """
    k, n = sorted(shape)
    seen = sigma[sigma > 10 * RESOLUTION * sigma[0]]
    noise = bulk(seen, shape)
    edges = (noise.level * (sqrt(n) - sqrt(k)), noise.level * (sqrt(n) + sqrt(k)))
    above = noise.above(seen)  # None for a weight of low rank: no bulk is left to measure
    return NoiseBulk(noise.level, *edges, noise.threshold, len(seen) if above is None else above)


def noise_curve(shape: tuple[int, int], level: float, ranks: Sequence[float]) -> Tensor:
    """Return which singular values pure noise has at given positions from 1 on, on a line between two of them.

    Args:
        shape: ``(m, n)`` of the matrix.
        level: Standard deviation of its entries.
        ranks: Positions in the falling order.

    Example:
        >>> [round(sigma, 1) for sigma in noise_curve((100, 400), 1.0, [1, 50, 100]).tolist()]
        [29.5, 19.2, 10.3]
    """
    quantiles = _marchenko_pastur.spectrum(*shape)
    positions = torch.arange(1, len(quantiles) + 1, dtype=torch.float64)
    return level * interpolated(torch.tensor(ranks, dtype=torch.float64), positions, quantiles)
