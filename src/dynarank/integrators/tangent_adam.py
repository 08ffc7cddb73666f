"""Adam in the tangent space with second moments of whole rows and columns, which no change of bases touches."""

from dataclasses import dataclass

from torch import Tensor

from dynarank.factors import LowRankFactors, TangentGradient
from dynarank.integrators._tangent import AbstractTangentAdam, TangentVector, project_gradient
from dynarank.integrators.base import State


@dataclass(frozen=True)
class TangentAdam(AbstractTangentAdam):
    """Adam on the projected gradient, with a second moment of rank one as in Adafactor.

    The second moment of an entry of ``P(W) G`` is estimated from the mean squares of its row and of its column,
    ``v = rows columns^T / mean``. They belong to ``W``, not to its factors: turning the bases changes nothing, and a
    rank event leaves them as they are. The quotient is projected back on the tangent space, then retracted by QR. No
    m x n matrix is formed. ``lr`` is about the change of an entry of ``W``, as in Adam.

    Args:
        beta2: Weight of the past in the averaged squares, 0 to 1.
        eps: Added to the root mean square of a row and of a column, in the units of the gradient's entries.

    Reference:
        Kingma, Ba, "Adam", ICLR 2015, https://arxiv.org/abs/1412.6980, with the second moment of Shazeer, Stern,
        "Adafactor", ICML 2018, https://arxiv.org/abs/1804.04235, on the tangent space of Schotthöfer et al., NeurIPS
        2022, https://arxiv.org/abs/2205.13571. No clipping and no relative step, unlike Adafactor.
    """

    typical_lr = 0.01

    def squares(self, at: LowRankFactors, gradient: TangentVector) -> State:
        """Return the mean squares of the rows and of the columns of a tangent vector."""
        m, n = at.shape
        rows = _row_squares(at.U @ gradient.S + gradient.Up, at.U, gradient.Vp)
        columns = _row_squares(at.V @ gradient.S.mT + gradient.Vp, at.V, gradient.Up)
        return {"rows": rows / n, "columns": columns / m}

    def divide(self, at: LowRankFactors, momentum: TangentVector, squares: State) -> TangentVector:
        """Return ``P(W) (M / (v^1/2 + eps))``, with ``v^1/2 + eps`` of rank one: a scaling of rows and columns."""
        rows, columns = squares["rows"].unsqueeze(-1), squares["columns"].unsqueeze(-1)
        mean = rows.mean(-2, keepdim=True)
        a = 1 / (rows.sqrt() + self.eps)  # (m, 1)
        b = (mean.sqrt() + self.eps) / (columns.sqrt() + self.eps)  # (n, 1)
        # M = K V^T + U Vp^T, so diag(a) M diag(b) = (a K) (b V)^T + (a U) (b Vp)^T.
        K, U = a * (at.U @ momentum.S + momentum.Up), a * at.U
        V, Vp = b * at.V, b * momentum.Vp
        dK = K @ (V.mT @ at.V) + U @ (Vp.mT @ at.V)
        dL = V @ (K.mT @ at.U) + Vp @ (U.mT @ at.U)
        return project_gradient(at, TangentGradient(dK, dL, at.U.mT @ dK))

    def carry(self, squares: State, old: LowRankFactors, new: LowRankFactors) -> State:
        """Rows and columns of ``W`` are the same in all bases."""
        return squares


def _row_squares(K: Tensor, U: Tensor, Vp: Tensor) -> Tensor:
    """Return the squared row norms of ``K V^T + U Vp^T`` where ``V`` is orthonormal and orthogonal to ``Vp``."""
    rest = (U @ (Vp.mT @ Vp) * U).sum(-1)
    return K.square().sum(-1) + rest.clamp_min(0)  # a sum of squares but for rounding
