"""Parallel basis update and Galerkin: all of K, L and S from one gradient, then the best rank-r approximation."""

from torch import Tensor

from dynarank import factors
from dynarank.factors import FactorPair
from dynarank.integrators._tangent import project_gradient, retract_svd
from dynarank.integrators.base import AbstractIntegrator, Point, State, read, read_gradient


class ParallelBUG(AbstractIntegrator):
    """Parallel BUG step: K, L and S move at once in the bases ``[U | dK]``, ``[V | dL]``, truncated back to rank r.

    With explicit Euler steps this is Riemannian gradient descent with the truncated SVD as retraction. It has no
    momentum and cannot raise a rank by itself: new singular values are of second order in ``lr``.

    Reference:
        Ceruti, Kusch, Lubich, "A parallel rank-adaptive integrator for dynamical low-rank approximation", SIAM J. Sci.
        Comput. 2024, https://arxiv.org/abs/2304.05660; for networks Schotthöfer, Kusch et al., "GeoLoRA",
        https://arxiv.org/abs/2410.18720. Truncation to a tolerance is left to the rank policy.
    """

    def init(self, point: Point) -> State:
        """Return an empty state."""
        return {}

    def advance(
        self, point: Point, gradient: FactorPair | Tensor, state: State, *, lr: float, momentum: float, trusted: bool
    ) -> tuple[Point, State]:
        """Take the step and truncate to the same rank."""
        W0 = read(point, trusted=trusted)
        g = project_gradient(W0, read_gradient(W0, point, gradient, trusted=trusted))
        return factors.to_pair(retract_svd(W0, g.scaled(lr))), state

    def transport(self, state: State, old: Point, new: Point) -> State:
        """Nothing to carry."""
        return state

    def directions(self, state: State, point: Point) -> None:
        """None are known between steps; the caller draws random ones."""
