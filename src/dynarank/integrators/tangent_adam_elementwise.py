"""Adam on the coordinates of the tangent space in the frame of the singular vectors."""

from dataclasses import dataclass

from dynarank.factors import LowRankFactors
from dynarank.integrators._tangent import AbstractTangentAdam, TangentVector, outside
from dynarank.integrators.base import State


@dataclass(frozen=True)
class TangentAdamElementwise(AbstractTangentAdam):
    """Adam on every coordinate of ``S``, ``Up`` and ``Vp`` for itself, with a QR retraction.

    The coordinates are those in the singular vectors of ``W``. Where transport is ``R`` on the first moment, it is
    ``R * R``, entry by entry, on the second: what the squares of independent entries would do. None becomes negative,
    a sign flip or an exchange of two vectors is exact, and every other turn blurs them. So the step depends on the
    frame: where singular values are equal their vectors are arbitrary and so is the step, and near such a point two
    runs that differ by rounding part. `TangentAdam` has no such frame.

    Args:
        beta2: Weight of the past in the averaged squares, 0 to 1.
        eps: Added to the root of the averaged squares, in the units of the gradient's coordinates.

    Reference:
        Kingma, Ba, "Adam", ICLR 2015, https://arxiv.org/abs/1412.6980, on the tangent space of Schotthöfer et al.,
        NeurIPS 2022, https://arxiv.org/abs/2205.13571.
    """

    typical_lr = 0.03

    def squares(self, at: LowRankFactors, gradient: TangentVector) -> State:
        """Return the square of every coordinate."""
        return {f"{name}_squares": value.square() for name, value in vars(gradient).items()}

    def divide(self, at: LowRankFactors, momentum: TangentVector, squares: State) -> TangentVector:
        """Return the quotient of each coordinate, without the parts that it has along the bases."""
        S, Up, Vp = (value / (squares[f"{name}_squares"].sqrt() + self.eps) for name, value in vars(momentum).items())
        return TangentVector(S, outside(at.U, Up), outside(at.V, Vp))

    def carry(self, squares: State, old: LowRankFactors, new: LowRankFactors) -> State:
        """Return what transport would do to independent entries of these squares."""
        S, Up, Vp = squares["S_squares"], squares["Up_squares"], squares["Vp_squares"]
        M, N = (new.U.mT @ old.U).square(), (new.V.mT @ old.V).square()  # (r1, r0)
        into_U, into_V = outside(old.U, new.U).square(), outside(old.V, new.V).square()  # from Up and Vp to S
        out_of_U, out_of_V = outside(new.U, old.U).square(), outside(new.V, old.V).square()  # from S to Up and Vp
        left, right = Up.mT @ into_U, Vp.mT @ into_V  # (r0, r1)
        return {
            "S_squares": (M @ S + left.mT) @ N.mT + M @ right,
            "Up_squares": (Up + out_of_U @ S) @ N.mT + out_of_U @ right,
            "Vp_squares": (Vp + out_of_V @ S.mT) @ M.mT + out_of_V @ left,
        }
