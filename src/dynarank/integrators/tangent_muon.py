"""Orthogonalised momentum in the tangent space ("Muon" on the manifold), with a QR retraction."""

import torch
from torch import Tensor

from dynarank import linalg
from dynarank.integrators._tangent import AbstractTangentIntegrator, TangentVector


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

    def direction(self, momentum: TangentVector, shape: tuple[int, int]) -> TangentVector:
        """Return the orthogonalised momentum, scaled by ``sqrt(m / n)``."""
        Up, T1, R1 = _basis(momentum.Up)
        Vp, T2, R2 = _basis(momentum.Vp)
        rank = momentum.S.shape[-1]
        corner = R1.new_zeros(*R1.shape[:-2], R1.shape[-2], R2.shape[-2])
        core = torch.cat([torch.cat([momentum.S, R2.mT], -1), torch.cat([R1, corner], -1)], -2)
        O = linalg.newton_schulz(core)  # noqa: E741
        turned = TangentVector(
            O[..., :rank, :rank], Up @ (T1 @ O[..., rank:, :rank]), Vp @ (T2 @ O[..., :rank, rank:].mT)
        )
        return turned.scaled((shape[0] / shape[1]) ** 0.5)


def _basis(columns: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return ``X, T, R`` with orthonormal ``Q = X T`` and ``columns = Q R``; what rounding hides may be shorter."""
    found = linalg.gram_qr(columns, damping=10 * torch.finfo(columns.dtype).eps)
    if found is None:
        Q, R = torch.linalg.qr(columns)
        return Q, torch.eye(R.shape[-2], dtype=R.dtype, device=R.device), R
    return found
