"""Heavy-ball momentum in the tangent space, with a QR retraction."""

from dynarank.factors import LowRankFactors
from dynarank.integrators._tangent import AbstractTangentIntegrator, TangentVector


class TangentHeavyBall(AbstractTangentIntegrator):
    """Gradient descent with Nesterov momentum in the tangent space and a QR retraction.

    ``lr`` means what it means in ``torch.optim.SGD(nesterov=True)``.

    Reference:
        The projected flow of Schotthöfer et al., "Low-rank lottery tickets", NeurIPS 2022,
        https://arxiv.org/abs/2205.13571, with momentum transported by projection as in Schotthöfer, Klein, Kusch,
        "A geometric framework for momentum-based optimizers for low-rank training", https://arxiv.org/abs/2506.17475.
    """

    typical_lr = 0.1

    def direction(self, momentum: TangentVector, at: LowRankFactors) -> TangentVector:
        """Return the momentum itself."""
        return momentum
