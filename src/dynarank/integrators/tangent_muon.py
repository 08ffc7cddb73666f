"""Orthogonalised momentum in the tangent space ("Muon" on the manifold), with a QR retraction."""

import torch
from torch import Tensor

from dynarank import linalg
from dynarank.factors import LowRankFactors
from dynarank.integrators._tangent import AbstractTangentIntegrator, TangentVector, is_large, project


class TangentMuon(AbstractTangentIntegrator):
    """Steps along the polar factor of the tangent momentum: every direction moves by the same amount.

    The step has spectral norm about ``lr * sqrt(m / n)`` whatever the gradient's size, so a learning rate carries
    over between layers and ranks. The momentum is the 2r x 2r matrix ``[[S, R2^T], [R1, 0]]`` between the bases
    ``[U | Q1]`` and ``[V | Q2]``; its polar factor is projected back on the tangent space.

    Reference:
        Jordan et al., "Muon", 2024, https://kellerjordan.github.io/posts/muon, on the tangent space of
        Schotthöfer et al., NeurIPS 2022, https://arxiv.org/abs/2205.13571. Compare Bogachev et al.,
        "RiemannLoRA", https://arxiv.org/abs/2507.12142.
    """

    typical_lr = 0.025

    def direction(self, momentum: TangentVector, at: LowRankFactors) -> TangentVector:
        """Return the orthogonalised momentum, scaled by ``sqrt(m / n)``."""
        m, n = at.shape
        turned = _in_bases(momentum) if 2 * at.rank <= min(m, n) else _as_a_whole(momentum, at)
        return turned.scaled((m / n) ** 0.5)


def _in_bases(momentum: TangentVector) -> TangentVector:
    """Return the projected polar factor by way of the ``2r x 2r`` matrix."""
    Up, T1, R1 = _basis(momentum.Up)
    Vp, T2, R2 = _basis(momentum.Vp)
    rank = momentum.S.shape[-1]
    corner = R1.new_zeros(*R1.shape[:-2], R1.shape[-2], R2.shape[-2])
    core = torch.cat([torch.cat([momentum.S, R2.mT], -1), torch.cat([R1, corner], -1)], -2)
    O = linalg.newton_schulz(core)  # noqa: E741
    left, right = O[..., rank:, :rank], O[..., :rank, rank:].mT
    return TangentVector(O[..., :rank, :rank], Up @ (T1 @ left), Vp @ (T2 @ right))


def _as_a_whole(momentum: TangentVector, at: LowRankFactors) -> TangentVector:
    """Return the same by way of the ``m x n`` matrix, which is smaller where ``2r`` is above ``m`` or ``n``."""
    return project(at, linalg.newton_schulz(momentum.to_dense(at)))


def _basis(columns: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return ``X, T, R`` with orthonormal ``Q = X T`` and ``columns = Q R``; what rounding hides may be shorter."""
    found = linalg.gram_qr(columns, damping=10 * torch.finfo(columns.dtype).eps) if is_large(columns) else None
    if found is None:
        Q, R = torch.linalg.qr(columns)
        return Q, torch.eye(R.shape[-2], dtype=R.dtype, device=R.device), R
    return found
