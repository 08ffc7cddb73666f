"""Rank-adaptive basis update and Galerkin as published: augmented bases, and a gradient of its own for S."""

import torch
from torch import Tensor

from dynarank import factors, linalg
from dynarank.factors import FactorPair, LowRankFactors
from dynarank.integrators._tangent import project_gradient
from dynarank.integrators.base import AbstractClosureIntegrator, Point, Stages, State, read, read_gradient


class RankAdaptiveBUG(AbstractClosureIntegrator):
    """BUG step in the bases ``[U | dK]``, ``[V | dL]``, which hold the old ones, with a second gradient for S.

    With a rank event after every step, ``Periodic(every=1)``, and a policy that truncates to a tolerance and tries no
    candidates of its own, ``RelativeTail(0.1, growth=0)``, this is the integrator of dynamical low-rank training: the
    policy sees all 2r singular values. Between events the step is cut back to its own rank. Biases and norms take the
    second gradient. The network runs twice a step, so batch statistics are updated twice.

    Reference:
        Ceruti, Kusch, Lubich, "A rank-adaptive robust integrator for dynamical low-rank approximation", BIT 2022,
        https://arxiv.org/abs/2104.05247; Schotthöfer et al., "Low-rank lottery tickets", NeurIPS 2022,
        https://arxiv.org/abs/2205.13571, algorithm 1.
    """

    def stages(
        self, point: Point, gradient: FactorPair | Tensor, state: State, *, lr: float, momentum: float, trusted: bool
    ) -> Stages:
        """Ask for ``dS`` at the same weight in the augmented bases."""
        W0 = read(point, trusted=trusted)
        g = project_gradient(W0, read_gradient(W0, point, gradient, trusted=trusted))
        left, right = linalg.complement(W0.U, g.Up, W0.rank), linalg.complement(W0.V, g.Vp, W0.rank)
        grown = factors.augment(W0, left=left, right=right)  # (m, 2r), (n, 2r), or fewer columns near full rank
        dS = yield grown
        return LowRankFactors(grown.U, grown.S - lr * dS, grown.V), {"rank": torch.tensor(W0.rank)}
