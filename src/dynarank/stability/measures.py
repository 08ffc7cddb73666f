"""What a matrix shows by its singular value decomposition, and how far it has turned: pure functions."""

from dataclasses import dataclass
from math import inf, sqrt
from typing import final

import torch
from torch import Tensor

from dynarank import linalg
from dynarank.ranks import _marchenko_pastur

TOP = 8  # leading directions whose overlap is followed
TRACY_WIDOM = 2.0234  # below it lies the largest eigenvalue of 99 in 100 noise matrices, centred and scaled


@final
@dataclass(frozen=True)
class Directions:
    """A matrix ``W = U diag(sigma) V^T`` by its directions; those that drown in rounding are left out.

    Args:
        U: Orthonormal basis of the column space.
        sigma: Singular values, descending, all above rounding error of the largest.
        V: Orthonormal basis of the row space.

    Shape:
        ``U (m, r)``, ``sigma (r,)``, ``V (n, r)`` for ``W (m, n)``; ``r`` is 0 for a matrix of zeros.
    """

    U: Tensor
    sigma: Tensor
    V: Tensor

    @property
    def shape(self) -> tuple[int, int]:
        """Shape ``(m, n)`` of ``W``."""
        return self.U.shape[0], self.V.shape[0]

    @property
    def rank(self) -> int:
        """Number of directions."""
        return len(self.sigma)

    def to_dense(self) -> Tensor:
        """Return ``W`` itself, ``(m, n)``."""
        return self.U * self.sigma @ self.V.mT

    def like(self, other: "Directions") -> "Directions":
        """Return the same matrix on the device and in the dtype of another one."""
        return Directions(self.U.to(other.U), self.sigma.to(other.sigma), self.V.to(other.V))


def directions(weight: Tensor) -> Directions:
    """Return the directions of a weight, in at least float32.

    Args:
        weight: Of shape ``(m, *)``; everything after the first dimension is one, as for a convolution.

    Raises:
        ValueError: It holds NaN or infinity.

    Example:
        >>> at = directions(torch.diag(torch.tensor([3.0, 2.0, 0.0])))
        >>> at.rank, at.sigma.tolist()
        (2, [3.0, 2.0])
    """
    return resolved(*linalg.svd(weight.detach().as_subclass(Tensor).flatten(1)))


def resolved(U: Tensor, sigma: Tensor, V: Tensor) -> Directions:
    """Return the directions of a singular value decomposition above rounding, the same that `linalg.polar` keeps."""
    floor = sigma[:1] * torch.finfo(sigma.dtype).eps * max(len(U), len(V))
    rank = int((sigma > floor).sum())
    return Directions(U[:, :rank].contiguous(), sigma[:rank].contiguous(), V[:, :rank].contiguous())


# --- of two looks ------------------------------------------------------------------------------------------------


def stability(before: Directions, after: Directions) -> float:
    """Return ``S = tr(E_before^T E_after) / r`` of the orthogonal polar factors ``E = U V^T``, ``r`` the smaller rank.

    1 is unmoved, 0 unrelated. At full rank ``r`` is ``min(m, n)`` and ``S`` the mean cosine between the columns of the
    two factors; where one has more directions than the other, ``S`` is about those that both may have. ``E`` does not
    depend on the signs and rotations that an SVD leaves open, nor on the singular values.

    All directions count alike: weak ones, which a step turns most, make a layer look unstable although its strong
    ones rest, so look at `overlap` too. And ``S`` goes to 1 wherever the learning rate goes to 0, so look at `change`.

    Raises:
        ValueError: The shapes differ.

    Example:
        >>> one, turned = torch.eye(2), torch.tensor([[0.8, -0.6], [0.6, 0.8]])
        >>> stability(directions(one), directions(5 * one)), round(stability(directions(one), directions(turned)), 6)
        (1.0, 0.8)

    Reference:
        Coquelin et al., "Harnessing orthogonality to train low-rank neural networks", 2024,
        https://arxiv.org/abs/2401.08505. There the weight has full rank.
    """
    _check_shapes("stability", before, after)
    r = min(before.rank, after.rank)
    if not r:
        return float(before.rank == after.rank)
    trace = ((before.U.mT @ after.U) * (before.V.mT @ after.V)).sum(dtype=torch.float64)
    return min(1.0, float(trace) / r)


def overlap(before: Directions, after: Directions, *, top: int = TOP) -> float:
    """Return ``||U_before^T U_after||_F^2 / k`` of the ``k`` leading directions: 1 for one subspace, 0 if orthogonal.

    The bases are those of the longer side of the matrix, with ``k = top`` or the smaller rank. Unrelated subspaces
    have ``k / max(m, n)``. Where the singular values ``k`` and ``k + 1`` are equal the subspace is not determined.

    Raises:
        ValueError: The shapes differ, or ``top`` is below 1.

    Example:
        >>> W = torch.diag(torch.tensor([3.0, 2.0, 1.0]))
        >>> overlap(directions(W), directions(W.flip(0, 1)), top=2)
        0.5
    """
    _check_shapes("overlap", before, after)
    if top < 1:
        raise ValueError(f"overlap: top must be at least 1, got {top}.")
    k = min(top, before.rank, after.rank)
    if not k:
        return float(before.rank == after.rank)
    one, other = (at.U[:, :k] if len(at.U) >= len(at.V) else at.V[:, :k] for at in (before, after))
    return min(1.0, float((one.mT @ other).square().sum(dtype=torch.float64)) / k)


def change(before: Directions, after: Directions) -> float:
    """Return ``||W_after - W_before||_F / ||W_before||_F``, infinity where only ``W_before`` is zero.

    In float32 what is below about 1e-6 is not resolved.

    Raises:
        ValueError: The shapes differ.

    Example:
        >>> change(directions(torch.eye(3)), directions(1.5 * torch.eye(3)))
        0.5
    """
    _check_shapes("change", before, after)
    moved = float(torch.linalg.matrix_norm(after.to_dense() - before.to_dense()))
    if not before.rank:
        return inf if after.rank else 0.0
    return moved / float(torch.linalg.vector_norm(before.sigma))


def _check_shapes(name: str, before: Directions, after: Directions) -> None:
    if before.shape != after.shape:
        raise ValueError(f"{name} needs two matrices of one shape, got {before.shape} and {after.shape}.")


# --- of one look -------------------------------------------------------------------------------------------------


def stable_rank(sigma: Tensor) -> float:
    """Return ``||W||_F^2 / ||W||_2^2``, 0 for a weight of zeros.

    Example:
        >>> stable_rank(torch.tensor([4.0, 2.0, 2.0]))
        1.5
    """
    return float((sigma.double() / sigma[:1]).square().sum()) if float(sigma.sum()) else 0.0


def effective_rank(sigma: Tensor) -> float:
    """Return the exponential of the entropy of the singular values, normalised to sum 1; 0 for a weight of zeros.

    Example:
        >>> round(effective_rank(torch.tensor([1.0, 1.0, 1.0, 0.0])), 6)
        3.0

    Reference:
        Roy, Vetterli, "The effective rank: a measure of effective dimensionality", EUSIPCO 2007.
    """
    total = float(sigma.sum(dtype=torch.float64))
    return float(torch.special.entr(sigma.double() / total).sum().exp()) if total else 0.0


def retained_energy(sigma: Tensor, rank: int) -> float:
    """Return ``||W_rank||_F^2 / ||W||_F^2`` of the best approximation of a rank; 1 for a weight of zeros.

    Example:
        >>> retained_energy(torch.tensor([2.0, 1.0]), 1)
        0.8
    """
    energies = (sigma.double() / sigma[:1]).square()
    return float(energies[:rank].sum() / energies.sum()) if float(sigma.sum()) else 1.0


@final
@dataclass(frozen=True)
class Bulk:
    """The singular values of noise: of a random matrix with the median singular value of a weight.

    Args:
        level: Standard deviation of its entries; 0 where the weight has too few directions to show noise.
        threshold: What its largest singular value rarely exceeds.
    """

    level: float
    threshold: float

    def above(self, sigma: Tensor) -> int | None:
        """Return how many singular values stand above the noise, None where none shows."""
        return int((sigma > self.threshold).sum()) if self.level else None


def bulk(sigma: Tensor, shape: tuple[int, int]) -> Bulk:
    """Return the noise whose median singular value is that of a weight.

    Trained weights have heavier tails than noise, so what stands above is a guide and no proof.

    Args:
        sigma: Singular values, descending; those left out count as zero.
        shape: ``(m, n)`` of the weight.

    Example:
        >>> _ = torch.manual_seed(1)
        >>> noise = 0.1 * torch.randn(300, 200)
        >>> for weight in (noise, noise + 0.05):  # 0.05 everywhere is one direction with singular value 12
        ...     sigma = directions(weight).sigma
        ...     found = bulk(sigma, (300, 200))
        ...     print(f"{found.level:.2f} {found.threshold:.1f} {found.above(sigma)}")
        0.10 3.2 0
        0.10 3.2 1

    Reference:
        Marchenko, Pastur, "Distribution of eigenvalues for some sets of random matrices", Math. USSR-Sbornik 1967; the
        level by the median is that of Gavish, Donoho, "The optimal hard threshold for singular values is 4/sqrt(3)",
        IEEE Transactions on Information Theory 2014, https://arxiv.org/abs/1305.5870; the threshold is that of
        Johnstone, "On the distribution of the largest eigenvalue in principal components analysis", Annals of
        Statistics 2001, with the centring of Ma, Bernoulli 2012, https://arxiv.org/abs/0810.1329.
    """
    k, n = sorted(shape)
    if len(sigma) <= k // 2:
        return Bulk(0.0, 0.0)
    level = float(sigma[k // 2]) / float(_marchenko_pastur.spectrum(k, n)[k // 2])
    a, b = sqrt(n - 0.5), sqrt(k - 0.5)
    return Bulk(level, level * sqrt((a + b) ** 2 + TRACY_WIDOM * (a + b) * (1 / a + 1 / b) ** (1 / 3)))
