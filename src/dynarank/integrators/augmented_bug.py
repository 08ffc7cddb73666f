"""Augmented basis update and Galerkin with coefficient steps: grow the bases, train the core, cut back."""

from dataclasses import dataclass

import torch
from torch import Tensor

from dynarank import factors
from dynarank.factors import FactorPair, LowRankFactors
from dynarank.integrators._tangent import augmented, project_gradient
from dynarank.integrators.base import AbstractIntegrator, Point, State, read, read_gradient


@dataclass(frozen=True)
class AugmentedBUG(AbstractIntegrator):
    """Cycle of one basis step in ``[U | dK]``, ``[V | dL]``, coefficient steps on the 2r x 2r core, and truncation.

    The layer is in the core form between the basis step and the truncation, so that the core is an ordinary parameter.
    A rank event inside the cycle sees all 2r directions and ends it: that is how ranks grow. Each step needs one
    gradient; the paper's own coefficient step evaluates a second one.

    Args:
        coefficient_steps: Gradient steps on the core between the basis step and the truncation.

    Reference:
        Ceruti, Kusch, Lubich, "A rank-adaptive robust integrator for dynamical low-rank approximation", BIT 2022,
        https://arxiv.org/abs/2104.05247; Schotthöfer et al., "Low-rank lottery tickets", NeurIPS 2022,
        https://arxiv.org/abs/2205.13571; coefficient steps as in Schotthöfer, Yang, Schnake, "Dynamical low-rank
        compression of neural networks with robustness under adversarial attacks", https://arxiv.org/abs/2505.08022.
    """

    core_form = True
    coefficient_steps: int = 9

    def __post_init__(self) -> None:
        if self.coefficient_steps < 1:
            raise ValueError(f"AugmentedBUG: coefficient_steps must be at least 1, got {self.coefficient_steps}.")

    def init(self, point: Point) -> State:
        """Return an empty state: the next step is a basis step."""
        return {}

    def advance(
        self, point: Point, gradient: FactorPair | Tensor, state: State, *, lr: float, momentum: float, trusted: bool
    ) -> tuple[Point, State]:
        """Take the basis step, a coefficient step, or the last coefficient step with the truncation."""
        if isinstance(point, FactorPair):
            W0 = read(point, trusted=trusted)
            g = project_gradient(W0, read_gradient(W0, point, gradient, trusted=trusted))
            return augmented(W0, g.scaled(lr)), {"rank": torch.tensor(W0.rank), "count": torch.tensor(0)}
        W1 = LowRankFactors(point.U, point.S - lr * gradient, point.V)  # type: ignore[operator]
        count = int(state["count"]) + 1 if state else self.coefficient_steps
        if count < self.coefficient_steps:
            return W1, {"rank": state["rank"], "count": torch.tensor(count)}
        W1 = factors.diagonalise(W1)
        return factors.to_pair(factors.truncate(W1, rank=int(state["rank"]) if state else W1.rank)), {}

    def transport(self, state: State, old: Point, new: Point) -> State:
        """A rank event ends the cycle."""
        return {}

    def directions(self, state: State, point: Point) -> None:
        """None are known; the caller draws random ones."""
