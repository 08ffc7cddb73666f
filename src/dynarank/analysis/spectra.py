"""The spectrum of a weight: how its singular values decay, and which of them pure noise would have as well."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from math import sqrt

import torch
from torch import Tensor

from dynarank import linalg
from dynarank.compress.timing import interpolated

RESOLUTION = 1e-8  # of the largest singular value: what is smaller drowns in the rounding of the Gram matrix
POINTS = 256  # of a long spectrum so many are kept
BLOCK = 2**24  # numbers widened to float64 at a time: 128 MiB
NODES = 4096  # at which the law of the noise is integrated
TRACY_WIDOM = 2.0234  # below it lies the largest eigenvalue of 99 in 100 noise matrices, centred and scaled


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
    entropy = torch.special.entr(sigma / sigma.sum().clamp_min(torch.finfo(sigma.dtype).tiny)).sum()
    norm = torch.linalg.vector_norm(sigma / sigma[0]) if float(sigma[0]) else sigma.new_zeros(())
    levels = [int((errors > 1 - level).sum()) if float(norm) else 0 for level in (0.9, 0.95, 0.99)]
    return Spectrum(
        tuple(index + 1 for index in kept),
        tuple(sigma[kept].tolist()),
        tuple(errors[[index + 1 for index in kept]].tolist()),
        *levels,
        stable_rank=float(norm.square()),
        effective_rank=float(entropy.exp()) if float(norm) else 0.0,
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
    """Return the noise whose median singular value is that of a spectrum.

    Args:
        sigma: All singular values, falling.
        shape: ``(m, n)`` of the weight.

    Example:
        >>> _ = torch.manual_seed(1)
        >>> found = fit_noise(singular_values(0.1 * torch.randn(300, 200)), (300, 200))
        >>> round(found.level, 2), round(found.lower, 2), round(found.upper, 2), found.above
        (0.1, 0.32, 3.15, 0)

    Reference:
        Marchenko, Pastur, "Distribution of eigenvalues for some sets of random matrices", Math. USSR-Sbornik 1967; the
        level by the median is that of Gavish, Donoho, "The optimal hard threshold for singular values is 4/sqrt(3)",
        IEEE Transactions on Information Theory 2014, https://arxiv.org/abs/1305.5870; the threshold is that of
        Johnstone, "On the distribution of the largest eigenvalue in principal components analysis", Annals of
        Statistics 2001, with the centring of Ma, Bernoulli 2012, https://arxiv.org/abs/0810.1329.
    """
    k, n = min(shape), max(shape)
    resolved = 10 * RESOLUTION * float(sigma[0])
    middle = float(sigma[k // 2])
    if middle <= resolved:  # a weight of low rank: no bulk is left to measure
        return NoiseBulk(0.0, 0.0, 0.0, 0.0, int((sigma > resolved).sum()))
    level = middle / float(noise_curve(shape, 1.0, [k // 2 + 1]))
    a, b = sqrt(n - 0.5), sqrt(k - 0.5)
    threshold = level * sqrt((a + b) ** 2 + TRACY_WIDOM * (a + b) * (1 / a + 1 / b) ** (1 / 3))
    edges = (level * (sqrt(n) - sqrt(k)), level * (sqrt(n) + sqrt(k)))
    return NoiseBulk(level, *edges, threshold, int((sigma > threshold).sum()))


def noise_curve(shape: tuple[int, int], level: float, ranks: Sequence[float]) -> Tensor:
    """Return which singular values pure noise has at given positions from 1 on: the quantiles of its density.

    Args:
        shape: ``(m, n)`` of the matrix.
        level: Standard deviation of its entries.
        ranks: Positions in the falling order.

    Example:
        >>> [round(sigma, 1) for sigma in noise_curve((100, 400), 1.0, [1, 50, 100]).tolist()]
        [29.5, 19.2, 10.3]
    """
    k, n = min(shape), max(shape)
    mass, roots = _law(k / n)
    return level * sqrt(n) * interpolated((torch.tensor(ranks, dtype=torch.float64) - 0.5) / k, mass, roots)


@cache
def _law(aspect: float) -> tuple[Tensor, Tensor]:
    """Return points of the Marchenko-Pastur law: the mass above an eigenvalue, rising, and the eigenvalue's root.

    With ``x = 1 + q + 2 sqrt(q) cos(t)`` the density ``sqrt((b - x)(x - a)) / (2 pi q x) dx`` of the eigenvalues, over
    the longer side, becomes ``2 sin(t)^2 / (pi x) dt``, which is smooth.
    """
    t = (torch.arange(NODES, dtype=torch.float64) + 0.5) * torch.pi / NODES
    x = 1 + aspect + 2 * sqrt(aspect) * t.cos()
    pieces = 2 * t.sin().square() / (torch.pi * x)
    mass = pieces.cumsum(0) - pieces / 2  # half of a piece lies above its middle
    return mass / pieces.sum(), x.sqrt()
