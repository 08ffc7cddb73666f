"""Riemannian gradient descent with transported momentum and the truncated SVD as retraction."""

from dynarank.factors import LowRankFactors
from dynarank.integrators._tangent import AbstractTangentIntegrator, TangentVector, retract_svd


class RiemannianGradient(AbstractTangentIntegrator):
    """Projected gradient descent with Nesterov momentum in the tangent space, retracted by the truncated SVD.

    ``W1`` is the best approximation of rank r of ``W - lr D``. Without momentum this is parallel BUG. The SVD is of a
    2r x 2r matrix in every step; `TangentHeavyBall` saves it and differs in second order. ``lr`` means what it means
    in ``torch.optim.SGD(nesterov=True)``.

    Reference:
        Vandereycken, "Low-rank matrix completion by Riemannian optimization", SIAM J. Optim. 2013,
        https://arxiv.org/abs/1209.3834; momentum transported by projection as in Schotthöfer, Klein, Kusch,
        "A geometric framework for momentum-based optimizers for low-rank training", https://arxiv.org/abs/2506.17475.
    """

    retract = staticmethod(retract_svd)

    def direction(self, momentum: TangentVector, at: LowRankFactors) -> TangentVector:
        """Return the momentum itself."""
        return momentum
