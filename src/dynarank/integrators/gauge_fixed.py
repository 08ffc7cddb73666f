"""Gradient descent on two factors whose gauge is put right now and then: the tangent step at the price of ``U V^T``."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import final

import torch
from torch import Tensor

from dynarank import linalg
from dynarank.factors import FactorPair
from dynarank.integrators._gauge_fixed import BLOCK, AbstractGaugeFixed

DAMPING = 1e-3  # of the mean square of the rows


@final
@dataclass(frozen=True)
class GaugeFixed(AbstractGaugeFixed):
    """Scaled gradient descent with Nesterov momentum on ``A`` and ``B``, balanced by Gram matrices now and then.

    In the balanced diagonal gauge ``B B^T`` and ``A A^T`` are both ``Sigma``, so the step ``A - h (B B^T)^-1 A.grad``
    of Riemannian descent, which does not slow down along small singular values, only scales rows. Between balancings
    the gauge is left to itself: rows are scaled by the inverse squares of what their lengths are now, and none moves
    by more than a part of its length. Thus a step costs what it costs without any geometry. Balancing takes products
    of ``r`` rows, and factorisations of ``r x r`` matrices in float64; its interval follows from the sizes and the rows
    of a batch, so that it takes about a twentieth of the time, but is ten steps at least, and no longer at first.

    Args:
        rows: About how many rows of inputs meet the layer in a step: samples, or tokens, or pixels.
        early: Steps at the beginning with an interval of ten.
        clip: Largest move of a row in a step, as a part of its length.

    Reference:
        Tong, Ma, Chi, "Accelerating ill-conditioned low-rank matrix estimation via scaled gradient descent", JMLR 2021,
        https://arxiv.org/abs/2005.08898, for the scaling. There it is an inverse of ``r x r`` in every step.
    """

    clip: float = 0.1

    typical_lr = 0.1

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.clip > 0:
            raise ValueError(f"GaugeFixed: clip must be above 0, got {self.clip}.")

    def move_(
        self, pair: FactorPair, gradient: FactorPair, averages: FactorPair, *, step: int, lr: float, momentum: float
    ) -> None:
        """Average the gradients, scale rows, step."""
        a, b = _squares(pair.A), _squares(pair.B)
        for factor, gradients, average, own, other in (
            (pair.A, gradient.A, averages.A, a, b),
            (pair.B, gradient.B, averages.B, b, a),
        ):
            scaling, longest = lr / other, self.clip * own.sqrt()  # (r, 1)
            for rows in _blocks(factor):
                g = linalg.widen(gradients[rows])
                average[rows].mul_(momentum).add_(g)
                ahead = torch.add(g, average[rows], alpha=momentum)  # Nesterov
                length = torch.linalg.vector_norm(ahead, dim=-1, keepdim=True)
                factor[rows].addcmul_(ahead, torch.minimum(scaling[rows], longest[rows] / length), value=-1)


def _squares(factor: Tensor) -> Tensor:
    """Return the squared lengths of the rows, ``(r, 1)``, damped, and never 0."""
    squares = torch.linalg.vector_norm(factor, dim=-1, keepdim=True).square_()
    return squares.add_(squares.mean(-2, keepdim=True), alpha=DAMPING).clamp_min_(torch.finfo(squares.dtype).tiny)


def _blocks(factor: Tensor) -> Iterator[slice]:
    """Yield the rows of a factor in blocks that fit into a cache; on other devices than the processor all at once."""
    rank, columns = factor.shape
    block = max(1, BLOCK // columns) if factor.device.type == "cpu" else rank
    return (slice(start, start + block) for start in range(0, rank, block))
