"""Any integrator, with the condition number of the weight kept below a bound."""

from dataclasses import dataclass, field

import torch
from torch import Tensor

from dynarank.factors import FactorPair, LowRankFactors, to_pair
from dynarank.integrators.base import AbstractIntegrator, Point, State, read
from dynarank.integrators.tangent_muon import TangentMuon

SLACK = 1e-5  # by which the bound may be exceeded before the weight is written anew: rounding alone does not


@dataclass(frozen=True)
class Conditioned(AbstractIntegrator):
    """After each step of another integrator, the nearest weight with ``sigma_1 / sigma_r <= largest``.

    The bases stay; singular values are clipped into the band ``[t, largest * t]`` whose ``t`` moves the weight least.
    The state is carried along. Nothing is limited while the layer is in the core form, inside a cycle of the
    integrator.

    New candidates count as directions: they are lifted to ``t`` in their first step and then look like signal to a rank
    policy. Use ranks that stay (`Fixed`) or a policy with ``growth=0``.

    Args:
        integrator: Integrator that takes the steps; one gradient each.
        largest: Largest condition number of a weight on its ``r`` directions.

    Example:
        >>> [round(sigma, 2) for sigma in nearest_spectrum(torch.tensor([8.0, 2.0, 0.5]), largest=4.0).tolist()]
        [7.65, 2.0, 1.91]

    Reference:
        Savostianova, Zangrando, Ceruti, Tudisco, "Robust low-rank training via approximate orthonormal constraints",
        NeurIPS 2023, https://arxiv.org/abs/2306.01485, for the idea of a band for the singular values; there it lies
        around their mean. Here it is the nearest one, and the steps are those of any integrator.
    """

    integrator: AbstractIntegrator = field(default_factory=TangentMuon)
    largest: float = 10.0

    def __post_init__(self) -> None:
        if not isinstance(self.integrator, AbstractIntegrator):
            raise TypeError(f"Conditioned: integrator must be an instance of one, got {self.integrator!r}.")
        if self.integrator.gradients != 1:
            kind, count = type(self.integrator).__name__, self.integrator.gradients
            raise ValueError(f"Conditioned: integrator must take one gradient a step, but {kind} takes {count}.")
        if not self.largest >= 1:
            raise ValueError(f"Conditioned: largest must be at least 1, got {self.largest}.")
        for name in ("keeps_gauge", "typical_lr"):
            object.__setattr__(self, name, getattr(self.integrator, name))

    def init(self, point: Point) -> State:
        """Return the integrator's own state."""
        return self.integrator.init(point)

    def advance(
        self, point: Point, gradient: FactorPair | Tensor, state: State, *, lr: float, momentum: float, trusted: bool
    ) -> tuple[Point, State]:
        """Take the integrator's step; clip the singular values if the bound is exceeded."""
        moved, state = self.integrator.advance(point, gradient, state, lr=lr, momentum=momentum, trusted=trusted)
        if not isinstance(moved, FactorPair):
            return moved, state
        at = read(moved, trusted=self.keeps_gauge)
        if bool(at.sigma[0] <= self.largest * (1 + SLACK) * at.sigma[-1]):
            return moved, state
        sigma = nearest_spectrum(at.sigma, largest=self.largest)
        limited = to_pair(LowRankFactors(at.U, torch.diag(sigma), at.V))
        return limited, self.integrator.transport(state, moved, limited)

    def transport(self, state: State, old: Point, new: Point) -> State:
        """Carry the integrator's state."""
        return self.integrator.transport(state, old, new)

    def directions(self, state: State, point: Point) -> tuple[Tensor, Tensor] | None:
        """Return what the integrator knows."""
        return self.integrator.directions(state, point)


def nearest_spectrum(sigma: Tensor, *, largest: float) -> Tensor:
    """Return the nearest spectrum with ``sigma[0] <= largest * sigma[-1]``: ``sigma`` clipped into ``[t, largest t]``.

    Half the derivative of the squared distance, ``sum (t - sigma)_+ - largest sum (sigma - largest t)_+``, rises with
    ``t`` and is linear between the knots ``sigma`` and ``sigma / largest``: ``t`` is where it passes zero.
    """
    wide = sigma.double()
    knots = torch.cat([wide, wide / largest]).sort().values
    low = (knots.unsqueeze(-1) - wide).clamp_min(0).sum(-1)
    high = (wide - largest * knots.unsqueeze(-1)).clamp_min(0).sum(-1)
    slope = low - largest * high
    right = int((slope < 0).sum())
    left = max(right - 1, 0)
    share = slope[left] / (slope[left] - slope[right]) if right > left else 0.0
    t = knots[left] + share * (knots[right] - knots[left])
    return wide.clamp(t, largest * t).to(sigma.dtype)
