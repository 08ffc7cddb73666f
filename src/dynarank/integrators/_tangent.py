"""Tangent vectors of the manifold of rank-r matrices: projection, transport, retraction, and steps along them."""

from abc import abstractmethod
from dataclasses import dataclass

import torch
from torch import Tensor

from dynarank import linalg
from dynarank.factors import FactorPair, LowRankFactors, TangentGradient, diagonalise, to_pair, truncate
from dynarank.integrators.base import AbstractIntegrator, Point, State, read, read_gradient

LARGE = 1 << 16  # entries from which Householder's QR is slower than a product and a Cholesky factor


@dataclass(frozen=True)
class TangentVector:
    """The matrix ``U S V^T + Up V^T + U Vp^T`` with ``Up`` orthogonal to ``U`` and ``Vp`` to ``V``.

    Shape:
        ``S (r, r)``, ``Up (m, r)``, ``Vp (n, r)``.
    """

    S: Tensor
    Up: Tensor
    Vp: Tensor

    def plus(self, other: "TangentVector", *, times: float) -> "TangentVector":
        """Return ``self + times * other``; both at the same point."""
        pairs = ((self.S, other.S), (self.Up, other.Up), (self.Vp, other.Vp))
        return TangentVector(*(torch.add(mine, theirs, alpha=times) for mine, theirs in pairs))

    def to_dense(self, at: LowRankFactors) -> Tensor:
        """Return the matrix itself, ``(m, n)``, of a vector at a point."""
        return (at.U @ self.S + self.Up) @ at.V.mT + at.U @ self.Vp.mT

    def scaled(self, factor: float | Tensor) -> "TangentVector":
        """Return ``factor * self``."""
        return TangentVector(factor * self.S, factor * self.Up, factor * self.Vp)


def project(at: LowRankFactors, matrix: Tensor) -> TangentVector:
    """Return ``P(W) Z`` of a dense matrix ``Z (m, n)``."""
    ZV, ZU = matrix @ at.V, matrix.mT @ at.U
    return TangentVector(at.U.mT @ ZV, outside(at.U, ZV), outside(at.V, ZU))


def project_gradient(at: LowRankFactors, gradient: TangentGradient) -> TangentVector:
    """Return ``P(W) G`` in coordinates: ``dS`` and the parts of ``dK``, ``dL`` orthogonal to the bases."""
    return TangentVector(gradient.dS, outside(at.U, gradient.dK), outside(at.V, gradient.dL))


def outside(basis: Tensor, columns: Tensor) -> Tensor:
    """Return the part of the columns that is orthogonal to the basis."""
    return columns - basis @ (basis.mT @ columns)


def is_large(columns: Tensor) -> bool:
    """Whether products of columns cost so much that their Gram matrix is worth its overhead."""
    return columns.numel() >= LARGE


def at_rest(at: LowRankFactors) -> TangentVector:
    """Return the tangent vector of zero."""
    return TangentVector(torch.zeros_like(at.S), torch.zeros_like(at.U), torch.zeros_like(at.V))


def transport(vector: TangentVector, old: LowRankFactors, new: LowRankFactors) -> TangentVector:
    """Return the orthogonal projection of a tangent vector ``T`` at ``old`` on the tangent space at ``new``."""
    M, N = new.U.mT @ old.U, new.V.mT @ old.V  # (r1, r0)
    left, right = vector.Up.mT @ new.U, vector.Vp.mT @ new.V  # (r0, r1)
    X, Y = vector.S @ N.mT + right, vector.S.mT @ M.mT + left  # U0^T T V1, V0^T T^T U1
    S = M @ X + left.mT @ N.mT  # U1^T T V1
    Up = old.U @ X + vector.Up @ N.mT - new.U @ S  # T V1 - U1 S, (m, r1)
    Vp = old.V @ Y + vector.Vp @ M.mT - new.V @ S.mT
    return TangentVector(S, outside(new.U, Up), outside(new.V, Vp))  # without this, rounding grows to NaN in 600 steps


def retract_qr(at: LowRankFactors, step: TangentVector) -> LowRankFactors:
    """Return ``W - step`` projected on the bases of ``K1 = (W - step) V`` and ``L1 = (W - step)^T U``: two thin QRs.

    With ``K1 = U1 R`` and ``L1 = V1 Q`` the new coefficients are ``R (V^T V1) - (U1^T U) (Vp^T V1)``, and ``V^T L1``
    and ``U^T K1`` are known. So the bases are formed once, already turned to make the coefficients diagonal.
    """
    E = at.S - step.S
    K, L = at.U @ E - step.Up, at.V @ E.mT - step.Vp  # (m, r), (n, r)
    left, right = (linalg.gram_qr(columns) if is_large(columns) else None for columns in (K, L))
    if left is None or right is None:
        U1, V1 = linalg.orthonormalise(K), linalg.orthonormalise(L)
        return diagonalise(LowRankFactors(U1, (U1.mT @ K) @ (at.V.mT @ V1) - (U1.mT @ at.U) @ (step.Vp.mT @ V1), V1))
    (K, T, R), (L, Z, Q) = left, right
    VV1 = torch.linalg.solve_triangular(Q, E.mT, upper=True, left=False)  # V^T L1 Q^-1
    UU1 = torch.linalg.solve_triangular(R, E, upper=True, left=False)  # U^T K1 R^-1
    P, sigma, O = linalg.svd(R @ VV1 - UU1.mT @ ((step.Vp.mT @ L) @ Z))  # noqa: E741
    return LowRankFactors(K @ (T @ P), torch.diag_embed(sigma), L @ (Z @ O))


def retract_svd(at: LowRankFactors, step: TangentVector) -> LowRankFactors:
    """Return the best rank-r approximation of ``W - step``: the SVD of a 2r x 2r matrix."""
    return truncate(diagonalise(augmented(at, step)), rank=at.rank)


def augmented(at: LowRankFactors, step: TangentVector) -> LowRankFactors:
    """Return ``W - step`` exactly, in the bases ``[U | Up]`` and ``[V | Vp]``: the parallel BUG step, not truncated."""
    left = linalg.complement(at.U, step.Up, at.rank)  # (m, min(r, m - r))
    right = linalg.complement(at.V, step.Vp, at.rank)
    S_K = -left.mT @ step.Up
    S_L = -step.Vp.mT @ right
    corner = S_K.new_zeros(*S_K.shape[:-1], right.shape[-1])
    S = torch.cat([torch.cat([at.S - step.S, S_L], -1), torch.cat([S_K, corner], -1)], -2)
    return LowRankFactors(torch.cat([at.U, left], -1), S, torch.cat([at.V, right], -1))


class AbstractTangentIntegrator(AbstractIntegrator):
    """A step ``W1 = retract(W - h D)`` along a direction ``D`` made from momentum in the tangent space.

    The momentum is kept as a tangent vector and transported by projection whenever the bases move.
    """

    retract = staticmethod(retract_qr)

    @abstractmethod
    def direction(self, momentum: TangentVector, at: LowRankFactors) -> TangentVector:
        """Return the direction of the step from Nesterov's momentum at a point."""

    def init(self, point: Point) -> State:
        """Return a zero momentum."""
        return vars(at_rest(read(point, trusted=False)))

    def advance(
        self, point: Point, gradient: FactorPair | Tensor, state: State, *, lr: float, momentum: float, trusted: bool
    ) -> tuple[Point, State]:
        """Average the gradient, step against the direction, retract, transport the momentum."""
        at = read(point, trusted=trusted)
        g = project_gradient(at, read_gradient(at, point, gradient, trusted=trusted))
        average = g.plus(TangentVector(**state), times=momentum)
        ahead = g.plus(average, times=momentum)  # Nesterov
        new = self.retract(at, self.direction(ahead, at).scaled(lr))
        return to_pair(new), vars(transport(average, at, new))

    def transport(self, state: State, old: Point, new: Point) -> State:
        """Project the momentum on the tangent space at the new point."""
        return vars(transport(TangentVector(**state), read(old, trusted=True), read(new, trusted=True)))

    def directions(self, state: State, point: Point) -> tuple[Tensor, Tensor] | None:
        """Return the leading singular directions of the momentum outside the bases."""
        return linalg.svd(state["Up"])[0], linalg.svd(state["Vp"])[0]


@dataclass(frozen=True)
class AbstractTangentAdam(AbstractIntegrator):
    """Adam in the tangent space: averaged gradients divided by the root of averaged squares, and a QR retraction.

    The first moment is a tangent vector, transported by projection. What the squares are, and how they follow the
    bases, is the method's own. Both are sums over the past; the sums of their weights turn them into means from the
    first step on.

    Args:
        beta2: Weight of the past in the averaged squares, 0 to 1.
        eps: Added to the root of the averaged squares, in the units of the gradient's entries.
    """

    beta2: float = 0.99
    eps: float = 1e-8

    def __post_init__(self) -> None:
        if not 0 <= self.beta2 < 1:
            raise ValueError(f"{type(self).__name__}: beta2 must be at least 0 and below 1, got {self.beta2}.")
        if not self.eps > 0:
            raise ValueError(f"{type(self).__name__}: eps must be above 0, got {self.eps}.")

    @abstractmethod
    def squares(self, at: LowRankFactors, gradient: TangentVector) -> State:
        """Return the squares of a gradient at ``at``, none negative."""

    @abstractmethod
    def divide(self, at: LowRankFactors, momentum: TangentVector, squares: State) -> TangentVector:
        """Return the tangent vector ``momentum / (squares^1/2 + eps)`` from averages of both."""

    @abstractmethod
    def carry(self, squares: State, old: LowRankFactors, new: LowRankFactors) -> State:
        """Return the squares in the bases of ``new``, none negative."""

    def init(self, point: Point) -> State:
        """Return zero moments."""
        at = read(point, trusted=False)
        rest = at_rest(at)
        none = torch.zeros((), dtype=at.S.dtype)
        return {**vars(rest), **self.squares(at, rest), "weight": none, "squares_weight": none.clone()}

    def advance(
        self, point: Point, gradient: FactorPair | Tensor, state: State, *, lr: float, momentum: float, trusted: bool
    ) -> tuple[Point, State]:
        """Average the gradient and its squares, step against their quotient, retract, carry both along."""
        at = read(point, trusted=trusted)
        g = project_gradient(at, read_gradient(at, point, gradient, trusted=trusted))
        average = g.plus(_first_moment(state), times=momentum)
        ahead = g.plus(average, times=momentum)  # Nesterov
        squares = {name: value + self.beta2 * state[name] for name, value in self.squares(at, g).items()}
        weight, squares_weight = 1 + momentum * state["weight"], 1 + self.beta2 * state["squares_weight"]
        means = {name: value / squares_weight for name, value in squares.items()}
        new = retract_qr(at, self.divide(at, ahead.scaled(1 / (1 + momentum * weight)), means).scaled(lr))
        moments = {**vars(transport(average, at, new)), **self.carry(squares, at, new)}
        return to_pair(new), {**moments, "weight": weight, "squares_weight": squares_weight}

    def transport(self, state: State, old: Point, new: Point) -> State:
        """Project the first moment on the tangent space at the new point, and carry the squares there."""
        here, there = read(old, trusted=True), read(new, trusted=True)
        squares = {name: state[name] for name in self.squares(here, at_rest(here))}
        return {**state, **vars(transport(_first_moment(state), here, there)), **self.carry(squares, here, there)}

    def directions(self, state: State, point: Point) -> tuple[Tensor, Tensor] | None:
        """Return the leading singular directions of the first moment outside the bases."""
        return linalg.svd(state["Up"])[0], linalg.svd(state["Vp"])[0]


def _first_moment(state: State) -> TangentVector:
    return TangentVector(state["S"], state["Up"], state["Vp"])
