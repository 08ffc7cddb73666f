"""A point on the manifold of low-rank matrices, in its two forms, and the algebra on it: pure functions on tensors.

``LowRankFactors`` is the form of the papers, ``W = U S V^T``. ``FactorPair`` is the form that layers store,
``W = A^T B``. In the *balanced diagonal gauge* the rows of a pair are ``A = Sigma^1/2 U^T`` and
``B = Sigma^1/2 V^T``, so that ``U``, ``Sigma``, ``V`` are read off by scaling rows.
"""

from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from dynarank import linalg

FLOOR = 1e-8  # smallest singular value that is written, as a fraction of the largest


@dataclass(frozen=True)
class LowRankFactors:
    """A matrix of rank at most ``r`` as ``W = U S V^T``.

    Args:
        U: Orthonormal basis of the column space.
        S: Coefficients; not necessarily diagonal, and rectangular where one basis has grown further than the other.
        V: Orthonormal basis of the row space.

    Shape:
        ``U (m, r)``, ``S (r, r)``, ``V (n, r)`` for ``W (m, n)`` in torch's ``(out, in)`` layout.

    Example:
        >>> factors = from_dense(torch.diag(torch.tensor([3.0, 2.0, 1.0])), rank=2)
        >>> factors.rank, factors.to_dense().diagonal().tolist()
        (2, [3.0, 2.0, 0.0])
    """

    U: Tensor
    S: Tensor
    V: Tensor

    @property
    def rank(self) -> int:
        """Largest rank that ``W`` can have: the smaller side of ``S``."""
        return min(self.S.shape[-2:])

    @property
    def shape(self) -> tuple[int, int]:
        """Shape ``(m, n)`` of ``W``."""
        return self.U.shape[-2], self.V.shape[-2]

    @cached_property
    def sigma(self) -> Tensor:
        """Diagonal of ``S``: the singular values, if the factors are diagonalised."""
        return self.S.diagonal(dim1=-2, dim2=-1)

    def to_dense(self) -> Tensor:
        """Return ``W`` itself, ``(m, n)``."""
        return self.U @ self.S @ self.V.mT


@dataclass(frozen=True)
class FactorPair:
    """A matrix of rank at most ``r`` as ``W = A^T B``, rank-first: ``A (r, m)``, ``B (r, n)``.

    The same class holds the gradients of the two factors.
    """

    A: Tensor
    B: Tensor

    @property
    def rank(self) -> int:
        """Number of rows of the factors."""
        return self.A.shape[-2]

    @property
    def shape(self) -> tuple[int, int]:
        """Shape ``(m, n)`` of ``W``."""
        return self.A.shape[-1], self.B.shape[-1]

    def to_dense(self) -> Tensor:
        """Return ``W`` itself, ``(m, n)``."""
        return self.A.mT @ self.B


@dataclass(frozen=True)
class TangentGradient:
    """The gradient ``G`` as dynamical low-rank training needs it: ``dK = G V``, ``dL = G^T U``, ``dS = U^T G V``.

    Shape:
        ``dK (m, r)``, ``dL (n, r)``, ``dS (r, r)``.
    """

    dK: Tensor
    dL: Tensor
    dS: Tensor


def from_dense(weight: Tensor, *, rank: int) -> LowRankFactors:
    """Return the best approximation of ``weight`` of the given rank: its truncated SVD, not rescaled."""
    U, sigma, V = linalg.svd(weight)
    return truncate(LowRankFactors(U, torch.diag_embed(sigma), V), rank=rank)


def diagonalise(factors: LowRankFactors) -> LowRankFactors:
    """Return the same matrix with ``S`` diagonal and descending: the SVD of the small ``S`` turns both bases."""
    P, sigma, Q = linalg.svd(factors.S)
    return LowRankFactors(factors.U @ P, torch.diag_embed(sigma), factors.V @ Q)


def truncate(factors: LowRankFactors, *, rank: int) -> LowRankFactors:
    """Return the leading ``rank`` directions of diagonalised factors; the error is the tail of ``sigma``."""
    cut = slice(rank)
    return LowRankFactors(
        factors.U[..., cut].contiguous(), factors.S[..., cut, cut].contiguous(), factors.V[..., cut].contiguous()
    )


def augment(factors: LowRankFactors, *, left: Tensor, right: Tensor) -> LowRankFactors:
    """Return the same matrix in bases grown by ``left (m, k)`` and ``right (n, l)``, orthogonal to the old ones."""
    S = torch.nn.functional.pad(factors.S, (0, right.shape[-1], 0, left.shape[-1]))
    return LowRankFactors(torch.cat([factors.U, left], -1), S, torch.cat([factors.V, right], -1))


def change_bases(factors: LowRankFactors, *, U: Tensor, V: Tensor) -> LowRankFactors:
    """Return the orthogonal projection of ``W`` on the bases: ``S = (U^T U0) S0 (V^T V0)^T``."""
    return LowRankFactors(U, (U.mT @ factors.U) @ factors.S @ (factors.V.mT @ V), V)


# --- the balanced diagonal gauge -------------------------------------------------------------------------------


def to_pair(factors: LowRankFactors, *, floor: float = FLOOR) -> FactorPair:
    """Write diagonalised factors in the balanced gauge ``A = Sigma^1/2 U^T``, ``B = Sigma^1/2 V^T``.

    No singular value is written below ``floor`` times the largest, so that every direction can be read back and
    trained; an all-zero matrix is written with ``floor`` itself.
    """
    root = _floored(factors.sigma, floor).sqrt().unsqueeze(-1)
    return FactorPair((root * factors.U.mT).contiguous(), (root * factors.V.mT).contiguous())


def _floored(sigma: Tensor, floor: float) -> Tensor:
    largest = sigma[..., :1]
    return torch.maximum(sigma, torch.where(largest > 0, largest * floor, torch.full_like(largest, floor)))


def read_balanced(pair: FactorPair) -> LowRankFactors:
    """Read a pair that is in the balanced gauge: the row norms are ``sqrt(sigma)``, the unit rows are the bases."""
    a, b = linalg.row_norms(pair.A), linalg.row_norms(pair.B)
    U = (linalg.widen(pair.A) / a.unsqueeze(-1)).mT
    V = (linalg.widen(pair.B) / b.unsqueeze(-1)).mT
    return LowRankFactors(U, torch.diag_embed(a * b), V)


def read_pair(pair: FactorPair) -> LowRankFactors:
    """Read any pair: diagonalised factors of ``W = A^T B``, by the Gram route or, where that is inexact, by QR.

    Shape:
        ``A (r, m)``, ``B (r, n)`` with any gauge; the result has rank ``r``.
    """
    return _read_by_gram(pair) or _read_by_qr(pair)


def _read_by_gram(pair: FactorPair) -> LowRankFactors | None:
    """Turn the rows of both factors into orthonormal bases; None where that is inexact."""
    turns = _turns(pair)
    if turns is None:
        return None
    left, sigma, right = turns
    A, B = linalg.widen(pair.A), linalg.widen(pair.B)
    root = sigma.sqrt().unsqueeze(-1)  # with it the turns are of moderate size, however small the weight is
    U, V = ((root * turn).to(rows) @ rows / root.to(rows) for turn, rows in ((left, A), (right, B)))
    return LowRankFactors(U.mT, torch.diag_embed(sigma.to(A)), V.mT)


def balancing_turns(pair: FactorPair, *, floor: float = FLOOR) -> tuple[Tensor, Tensor] | None:
    """Return ``T_A, T_B`` such that ``T_A A`` and ``T_B B`` are in the balanced gauge; None if rows are dependent.

    The matrix stays the same to rounding, however precise the Gram matrices are, which are products in the precision
    of the factors: ``T_A^T T_B`` is the identity but for singular values below the floor. Hence what is a gradient of
    ``A`` turns by ``T_B``, and one of ``B`` by ``T_A``.

    Shape:
        Both ``(r, r)``.
    """
    turns = _turns(pair, torch.promote_types(pair.A.dtype, torch.float32))
    if turns is None:
        return None
    left, sigma, right = turns
    root = _floored(sigma, floor).sqrt().unsqueeze(-1)
    dtype = linalg.widen(pair.A).dtype
    return (root * left).to(dtype), (root * right).to(dtype)


def _turns(pair: FactorPair, products: torch.dtype = torch.float64) -> tuple[Tensor, Tensor, Tensor] | None:
    """Return ``T_A, sigma, T_B`` in float64 with ``U = (T_A A)^T``, ``V = (T_B B)^T``; None if rows are dependent.

    Two r x r Cholesky factors in float64 instead of two tall QRs, of Gram matrices in the precision of ``products``.
    """
    sides = [_cholesky_of_rows(factor, products) for factor in (pair.A, pair.B)]
    if not all(bool((root.diagonal(dim1=-2, dim2=-1) >= 0.1).all()) for root, _ in sides):
        return None
    (left, a), (right, b) = sides
    # W = Qa^T C Qb with orthonormal rows Qa = left^-1 diag(a)^-1 A and the small core C.
    P, sigma, Q = linalg.svd(left.mT @ ((a * b).unsqueeze(-1) * right))
    return _turn(left, a, P), sigma, _turn(right, b, Q)


def _cholesky_of_rows(factor: Tensor, products: torch.dtype = torch.float64) -> tuple[Tensor, Tensor]:
    """Return ``L, norms`` with ``F F^T = diag(norms) L L^T diag(norms)``: unit rows keep small ones exact.

    ``L`` is zero where the rows are dependent, a row of zeros included.
    """
    factor = linalg.widen(factor)
    norms = linalg.row_norms(factor).clamp_min(torch.finfo(factor.dtype).tiny)
    unit = (factor / norms.unsqueeze(-1)).to(products)
    root, failed = torch.linalg.cholesky_ex((unit @ unit.mT).double())
    return torch.where(failed.reshape(*failed.shape, 1, 1) == 0, root, torch.zeros_like(root)), norms.double()


def _turn(root: Tensor, norms: Tensor, turn: Tensor) -> Tensor:
    """Return ``turn^T root^-1 diag(norms)^-1``."""
    return torch.linalg.solve_triangular(root, turn.mT, upper=False, left=False) / norms.unsqueeze(-2)


def _read_by_qr(pair: FactorPair) -> LowRankFactors:
    Qa, Ra = torch.linalg.qr(linalg.widen(pair.A).mT)
    Qb, Rb = torch.linalg.qr(linalg.widen(pair.B).mT)
    P, sigma, Q = linalg.svd(Ra.double() @ Rb.double().mT)
    return LowRankFactors(Qa @ P.to(Qa.dtype), torch.diag_embed(sigma.to(Qa.dtype)), Qb @ Q.to(Qb.dtype))


def check_decay(decay: float) -> float:
    """Return the part by which a weight is to shrink in a step.

    Raises:
        ValueError: It is 1 or more: singular values cannot be negative, and no direction may vanish.
    """
    if not decay < 1:
        raise ValueError(f"scaled: a weight can shrink by a factor above 0 only, got {1 - decay}; lower the decay.")
    return decay


def scaled(point: FactorPair | LowRankFactors, factor: float) -> FactorPair | LowRankFactors:
    """Return the point of ``factor * W``; a pair stays in its gauge.

    Raises:
        ValueError: ``factor`` is not positive: singular values cannot be, and no direction may vanish.
    """
    check_decay(1 - factor)
    if isinstance(point, LowRankFactors):
        return LowRankFactors(point.U, factor * point.S, point.V)
    return FactorPair(factor**0.5 * point.A, factor**0.5 * point.B)


def tangent_gradient(factors: LowRankFactors, pair: FactorPair, gradient: FactorPair) -> TangentGradient:
    """Return ``dK, dL, dS`` at ``factors``, the reading of ``pair``, from the gradients of the two stored factors.

    In the balanced gauge this scales rows; otherwise two small triangular solves undo the gauge:
    ``A.grad = B G^T`` and ``B = Y V^T`` give ``dK^T = Y^-1 A.grad``.
    """
    Y = linalg.widen(pair.B) @ factors.V  # (r, r)
    X = linalg.widen(pair.A) @ factors.U  # (r, r)
    dK = _solve_rows(Y, gradient.A).mT
    dL = _solve_rows(X, gradient.B).mT
    return TangentGradient(dK, dL, _shared_part(factors, dK, dL))


def tangent_gradient_balanced(factors: LowRankFactors, gradient: FactorPair) -> TangentGradient:
    """Return ``dK, dL, dS`` where ``factors`` was read from the balanced gauge: the rows scaled by ``sigma^-1/2``."""
    root = factors.sigma.sqrt().unsqueeze(-1)
    dK = (linalg.widen(gradient.A) / root).mT
    dL = (linalg.widen(gradient.B) / root).mT
    return TangentGradient(dK, dL, _shared_part(factors, dK, dL))


def _shared_part(factors: LowRankFactors, dK: Tensor, dL: Tensor) -> Tensor:
    """Return ``dS``: the lower triangle of ``U^T dK`` and the upper one of ``(V^T dL)^T``, which are equal.

    They differ where the loss was computed with the leading ``k`` directions alone (``active_rank``): then ``dK`` has
    columns, and ``dL^T`` rows, of these directions only. So put together, ``dK, dL, dS`` are the projection of the
    gradient on the tangent space at the truncated weight, and their sums over several ``k`` are sums of projections.
    """
    return (factors.U.mT @ dK).tril() + (dL.mT @ factors.V).triu(1)


def _solve_rows(gauge: Tensor, gradient: Tensor) -> Tensor:
    """Return ``gauge^-1 gradient`` with the rows of both scaled to unit size first."""
    size = linalg.row_norms(gauge).clamp_min(torch.finfo(gauge.dtype).tiny).unsqueeze(-1)
    return torch.linalg.solve(gauge / size, linalg.widen(gradient) / size)


def is_singular(pair: FactorPair) -> bool:
    """Whether a factor has lost a direction, so that the tangent gradient cannot be read from it."""
    limit = 4 * torch.finfo(linalg.widen(pair.A).dtype).eps ** 0.5
    roots = [_cholesky_of_rows(factor)[0].diagonal(dim1=-2, dim2=-1) for factor in (pair.A, pair.B)]
    return any(bool((root < limit).any()) for root in roots)
