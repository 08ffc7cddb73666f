"""Tensors of low multilinear rank, ``W = C x_1 U_1 ... x_d U_d``: points, tangent vectors, retractions; pure functions.

A point is kept in the *HOSVD gauge*: bases with orthonormal columns, and a core whose slices are orthogonal to each
other and fall in norm, along every factored mode at once. The norms of the slices are then the singular values of the
unfoldings of ``W``, and the core, which carries the whole weight, is never divided by them.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from math import prod

import torch
from torch import Tensor

from dynarank import linalg

FLOOR = 1e-8  # smallest singular value that is written, as a fraction of the largest

Bases = tuple[Tensor | None, ...]
Ranks = tuple[int | None, ...]


@dataclass(frozen=True)
class TuckerFactors:
    """A tensor as ``W = C x_1 U_1 ... x_d U_d``; a mode without a basis is not factored.

    The same class holds the gradients of core and bases.

    Args:
        core: ``C``.
        bases: ``U_i`` for each mode, or None. Orthonormal at a point of the manifold; any matrices elsewhere.

    Shape:
        ``C (r_1, ..., r_d)``, ``U_i (n_i, r_i)`` for ``W (n_1, ..., n_d)``; ``r_i = n_i`` where there is no basis.

    Example:
        >>> at = from_dense(torch.randn(8, 6, 3, 3), ranks=(4, 2, None, None))
        >>> tuple(at.core.shape), at.shape, at.ranks
        ((4, 2, 3, 3), (8, 6, 3, 3), (4, 2, None, None))
    """

    core: Tensor
    bases: Bases

    @property
    def ranks(self) -> Ranks:
        """Rank along each mode, None where it is not factored."""
        return tuple(None if U is None else U.shape[1] for U in self.bases)

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of ``W``."""
        sizes = zip(self.bases, self.core.shape, strict=True)
        return tuple(size if U is None else U.shape[0] for U, size in sizes)

    def modes(self) -> Iterator[tuple[int, Tensor]]:
        """Yield each factored mode with its basis."""
        return ((mode, U) for mode, U in enumerate(self.bases) if U is not None)

    @cached_property
    def frames(self) -> dict[int, tuple[Tensor, Tensor]]:
        """``Q_i, X_i`` of `row_frame` for each factored mode."""
        return {mode: row_frame(self.core, mode) for mode, _ in self.modes()}

    def to_dense(self) -> Tensor:
        """Return ``W`` itself."""
        return multiply(self.core, self.bases)


@dataclass(frozen=True)
class TuckerTangent:
    """The tensor ``D x_1 U_1 ... x_d U_d + sum_i K_i Q_i^T x_(j != i) U_j``, with ``K_i`` orthogonal to ``U_i``.

    ``Q_i`` spans the rows of the core's unfolding, as `row_frame` gives it; the parts are orthogonal to each other.

    Shape:
        ``core D (r_1, ..., r_d)``, ``slopes K_i (n_i, r_i)``.
    """

    core: Tensor
    slopes: Bases


# --- modes of a tensor -------------------------------------------------------------------------------------------


def unfold(tensor: Tensor, mode: int) -> Tensor:
    """Return the unfolding along a mode: its fibres are the columns.

    Example:
        >>> tuple(unfold(torch.zeros(2, 3, 5), 1).shape)
        (3, 10)
    """
    return tensor.movedim(mode, 0).flatten(1)


def fold(matrix: Tensor, mode: int, shape: Sequence[int]) -> Tensor:
    """Return the tensor with this unfolding; the size of ``mode`` itself is that of the matrix."""
    rest = [size for other, size in enumerate(shape) if other != mode]
    return matrix.reshape(-1, *rest).movedim(0, mode)


def multiply(tensor: Tensor, matrices: Sequence[Tensor | None], *, skip: int | None = None) -> Tensor:
    """Return ``tensor x_1 M_1 ... x_d M_d`` with ``M_i (new, old)``; None and the mode ``skip`` leave a mode alone."""
    for mode, matrix in enumerate(matrices):
        if matrix is not None and mode != skip:
            tensor = fold(matrix @ unfold(tensor, mode), mode, tensor.shape)
    return tensor.contiguous()


def row_frame(core: Tensor, mode: int) -> tuple[Tensor, Tensor]:
    """Return ``Q, X`` with ``unfold(core, mode) = X Q^T``: ``Q (k, r)`` orthonormal, ``X (r, r)`` lower triangular.

    Rows are scaled to unit size first, so that small slices of the core are as precise as large ones.
    """
    rows = linalg.widen(unfold(core, mode))
    norms = linalg.row_norms(rows).clamp_min(torch.finfo(rows.dtype).tiny).unsqueeze(-1)
    Q, R = torch.linalg.qr((rows / norms).mT)
    return Q, norms * R.mT


# --- points ------------------------------------------------------------------------------------------------------


def check_ranks(shape: Sequence[int], ranks: Ranks) -> None:
    """Raise unless there are tensors of this multilinear rank: each rank at most the product of the others."""
    if len(ranks) != len(shape) or all(rank is None for rank in ranks):
        raise ValueError(f"ranks must name one rank or None for each of {len(shape)} modes, got {ranks}.")
    sizes = [size if rank is None else rank for size, rank in zip(shape, ranks, strict=True)]
    for mode, rank in enumerate(ranks):
        largest = min(shape[mode], prod(sizes[:mode] + sizes[mode + 1 :]))
        if rank is not None and not 1 <= rank <= largest:
            raise ValueError(
                f"rank of mode {mode} must be between 1 and {largest}, its size or the product of the other ranks, "
                f"got {rank} in {ranks}."
            )


def admissible(shape: Sequence[int], ranks: Sequence[int | None]) -> Ranks:
    """Return the ranks with those of the other modes raised until that of outputs is possible."""
    ranks = list(ranks)
    sizes = [n if r is None else r for n, r in zip(shape, ranks, strict=True)]
    for place in range(1, 4):
        while ranks[place] is not None and sizes[0] > prod(sizes[1:]) and sizes[place] < shape[place]:
            sizes[place] += 1
            ranks[place] = sizes[place]
        rest = prod(sizes) // sizes[place]
        if ranks[place] is not None and sizes[place] > rest:
            ranks[place] = sizes[place] = rest
    return tuple(ranks)


def lowered(shape: Sequence[int], ranks: Ranks) -> Ranks:
    """Return the ranks with those lowered that no tensor can have: at most the size and the product of the others.

    Example:
        >>> lowered((64, 2, 3, 3), (64, 2, None, None))
        (18, 2, None, None)
    """
    sizes = [size if rank is None else min(rank, size) for size, rank in zip(shape, ranks, strict=True)]
    before: list[int] = []
    while sizes != before:
        before = list(sizes)
        for mode, rank in enumerate(ranks):
            if rank is not None:
                sizes[mode] = min(sizes[mode], prod(sizes[:mode] + sizes[mode + 1 :]))
    return tuple(None if rank is None else size for rank, size in zip(ranks, sizes, strict=True))


def from_dense(weight: Tensor, *, ranks: Ranks) -> TuckerFactors:
    """Return an approximation of the given ranks in the gauge: mode by mode the truncated SVD of what is left.

    The error is at most the root of the summed squared tails of the unfoldings, and at most ``sqrt(d)`` the best.

    Reference:
        Vannieuwenhoven, Vandebril, Meerbergen, "A new truncation strategy for the higher-order singular value
        decomposition", SIAM J. Sci. Comput. 2012, https://doi.org/10.1137/110836067.
    """
    check_ranks(weight.shape, ranks)
    core, bases = linalg.widen(weight), []
    for mode, rank in enumerate(ranks):
        if rank is None:
            bases.append(None)
            continue
        U, sigma, V = linalg.svd(unfold(core, mode))
        bases.append(U[:, :rank])
        core = fold(sigma[:rank, None] * V[:, :rank].mT, mode, core.shape)
    return to_gauge(TuckerFactors(core, tuple(bases)))


def read(point: TuckerFactors) -> TuckerFactors:
    """Return any Tucker tensor, whatever its bases, as a point in the gauge."""
    bases, turns = list(point.bases), list(point.bases)
    for mode, basis in point.modes():
        bases[mode], turns[mode] = torch.linalg.qr(linalg.widen(basis))
    return to_gauge(TuckerFactors(multiply(linalg.widen(point.core), turns), tuple(bases)))


def to_gauge(at: TuckerFactors, *, floor: float = FLOOR) -> TuckerFactors:
    """Return a point with orthonormal bases in the HOSVD gauge: the small SVDs of the core, in float64, turn them.

    No singular value is written below ``floor`` times the largest, so that every direction can be read back and
    trained. A rank above the product of the others falls to it.

    Reference:
        De Lathauwer, De Moor, Vandewalle, "A multilinear singular value decomposition", SIAM J. Matrix Anal. Appl.
        2000, https://doi.org/10.1137/S0895479896305696.
    """
    core, bases = at.core.double(), list(at.bases)
    for mode, U in at.modes():
        P, sigma, Q = linalg.svd(unfold(core, mode))
        least = floor * sigma[0] if sigma[0] > 0 else torch.full_like(sigma[0], floor)
        core = fold(sigma.maximum(least).unsqueeze(-1) * Q.mT, mode, core.shape)
        bases[mode] = U @ P.to(U.dtype)
    return TuckerFactors(core.to(linalg.widen(at.core).dtype).contiguous(), tuple(bases))


def truncate(at: TuckerFactors, *, ranks: Ranks) -> TuckerFactors:
    """Return the leading slices of a point in the gauge, in the gauge; the error is at most the root of the summed
    squared tails."""
    check_ranks(at.shape, ranks)
    cut = tuple(slice(rank) for rank in ranks)
    bases = tuple(None if U is None else U[:, c] for U, c in zip(at.bases, cut, strict=True))
    return to_gauge(TuckerFactors(at.core[cut], bases))


def augment(at: TuckerFactors, columns: Bases, *, floor: float = 0.0) -> TuckerFactors:
    """Return the same tensor in bases grown by ``columns``, orthogonal to them; the new slices of the core are zero.

    With a ``floor`` they are of that size, relative to the largest singular value, and orthogonal to the others, so
    that the point can be read. Then no rank exceeds the product of the others: superfluous columns are left out.
    """
    core, bases = linalg.widen(at.core), list(at.bases)
    size = floor * float(torch.linalg.matrix_norm(unfold(core, 0), 2) or 1.0)
    for mode, U in at.modes():
        new = columns[mode]
        if new is None or not new.shape[1]:
            continue
        rows = new.new_zeros(new.shape[1], core.numel() // core.shape[mode])
        if floor:
            Q, _ = row_frame(core, mode)
            rows = size * linalg.complement(Q, rows.mT, len(rows)).mT
        bases[mode] = torch.cat([U, new[:, : len(rows)]], 1)
        core = torch.cat([core, fold(rows, mode, core.shape)], mode)
    return TuckerFactors(core.contiguous(), tuple(bases))


# --- tangent vectors ---------------------------------------------------------------------------------------------


def project_gradient(at: TuckerFactors, gradient: TuckerFactors) -> TuckerTangent:
    """Return ``P(W) G`` from the gradients of core and bases at a point in the gauge.

    With ``X Q^T`` the unfolded core, ``U.grad = (G_(i) Q) X^T``: a triangular solve whose columns are scaled by the
    singular values, so that small ones lose no precision. ``C.grad`` is the part along all bases.
    """
    slopes = list(at.bases)
    for mode, U in at.modes():
        slope = gradient.bases[mode]
        assert slope is not None
        _, X = at.frames[mode]
        slopes[mode] = _off(U, torch.linalg.solve_triangular(X.mT, linalg.widen(slope), upper=True, left=False))
    return TuckerTangent(linalg.widen(gradient.core), tuple(slopes))


def turn_gradient(gradient: TuckerFactors, point: TuckerFactors, at: TuckerFactors) -> TuckerFactors:
    """Return the gradients of core and bases at ``at``, the reading of ``point``, from those at ``point``.

    With ``B = U Y^T`` the basis of the point, they are ``C.grad x Y^-1`` and ``B.grad Y``.
    """
    bases, undo = list(gradient.bases), list[Tensor | None](at.bases)
    for mode, U in at.modes():
        basis, slope = point.bases[mode], gradient.bases[mode]
        assert basis is not None
        assert slope is not None
        Y = linalg.widen(basis).mT @ U  # (r, r)
        bases[mode], undo[mode] = linalg.widen(slope) @ Y, torch.linalg.inv(Y)
    return TuckerFactors(multiply(linalg.widen(gradient.core), undo), tuple(bases))


def dense_tangent(at: TuckerFactors, vector: TuckerTangent) -> Tensor:
    """Return a tangent vector itself."""
    W = multiply(vector.core, at.bases)
    for mode, _ in at.modes():
        Q, _ = at.frames[mode]
        bases = [vector.slopes[i] if i == mode else U for i, U in enumerate(at.bases)]
        W = W + multiply(fold(Q.mT, mode, at.core.shape), bases)
    return W


def _off(basis: Tensor, columns: Tensor) -> Tensor:
    columns = columns - basis @ (basis.mT @ columns)
    return columns - basis @ (basis.mT @ columns)  # the second sweep: one alone drifts in float32
