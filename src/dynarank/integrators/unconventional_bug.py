"""Fixed-rank basis update and Galerkin, the "unconventional" integrator: K and L, then S in the new bases."""

from torch import Tensor

from dynarank import factors, linalg
from dynarank.factors import FactorPair, LowRankFactors
from dynarank.integrators.base import AbstractClosureIntegrator, Point, Stages, State, read, read_gradient


class UnconventionalBUG(AbstractClosureIntegrator):
    """BUG step of fixed rank: new bases from K and L, then a Galerkin step of S in them, with a gradient of its own.

    The bases are those of ``K1 = (W0 - h G) V0`` and ``L1 = (W0 - h G)^T U0``; S starts from the projection of ``W0``
    on them and takes the gradient there. Biases and norms take the second gradient. The network runs twice a step, so
    batch statistics are updated twice.

    Reference:
        Ceruti, Lubich, "An unconventional robust integrator for dynamical low-rank approximation", BIT 2022,
        https://arxiv.org/abs/2010.02022; for networks Schotthöfer et al., "Low-rank lottery tickets", NeurIPS 2022,
        https://arxiv.org/abs/2205.13571, algorithm 1 at fixed rank.
    """

    def stages(
        self, point: Point, gradient: FactorPair | Tensor, state: State, *, lr: float, momentum: float, trusted: bool
    ) -> Stages:
        """Ask for ``dS`` at the projection of the weight on the new bases."""
        W0 = read(point, trusted=trusted)
        g = read_gradient(W0, point, gradient, trusted=trusted)
        U1 = linalg.orthonormalise(W0.U @ W0.S - lr * g.dK)
        V1 = linalg.orthonormalise(W0.V @ W0.S.mT - lr * g.dL)
        projected = factors.change_bases(W0, U=U1, V=V1)
        dS = yield projected
        return factors.to_pair(factors.diagonalise(LowRankFactors(U1, projected.S - lr * dS, V1))), state
