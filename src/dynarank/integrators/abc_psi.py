"""Augmented backward-corrected projector splitting: a K step, then an L step in the augmented left basis."""

import torch
from torch import Tensor
from torch.nn import functional

from dynarank import linalg
from dynarank.factors import FactorPair, LowRankFactors
from dynarank.integrators.base import AbstractClosureIntegrator, Point, Stages, State, read, read_gradient


class AbcPSI(AbstractClosureIntegrator):
    """Projector splitting whose backward step is replaced by a projection: K, then L in the basis ``[U | K1]``.

    The L step takes the gradient ``G^T [U | K1]`` at the old weight, and its QR gives the new right basis and S with
    2r directions on each side. With a rank event after every step, ``Periodic(every=1)``, and a policy without
    candidates of its own, ``RelativeTail(0.1, growth=0)``, they are truncated to the tolerance, as published; between
    events to the rank before. Biases and norms take the second gradient. The network runs twice a step, so batch
    statistics are updated twice.

    Reference:
        Kusch, Schotthöfer, Walter, "An augmented backward-corrected projector splitting integrator for dynamical
        low-rank training", 2025, https://arxiv.org/abs/2502.03006.
    """

    def stages(
        self, point: Point, gradient: FactorPair | Tensor, state: State, *, lr: float, momentum: float, trusted: bool
    ) -> Stages:
        """Ask for the gradient of ``L`` where ``W0 = [U | Q] L^T``."""
        W0 = read(point, trusted=trusted)
        K1 = W0.U @ W0.S - lr * read_gradient(W0, point, gradient, trusted=trusted).dK
        U1 = torch.cat([W0.U, linalg.complement(W0.U, K1, W0.rank)], -1)  # (m, 2r), or fewer columns near full rank
        L0 = functional.pad(W0.V @ W0.S.mT, (0, U1.shape[-1] - W0.rank))  # (n, 2r): W0 has no part along the new ones
        slope = yield FactorPair(U1.mT.contiguous(), L0.mT.contiguous())
        V1, R = torch.linalg.qr(L0 - lr * linalg.widen(slope.B).mT)
        return LowRankFactors(U1, R.mT, V1), {"rank": torch.tensor(W0.rank)}
