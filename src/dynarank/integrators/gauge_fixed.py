"""Gradient descent on two factors whose gauge is put right now and then: the tangent step at the price of ``U V^T``."""

from collections.abc import Iterator
from dataclasses import dataclass
from math import ceil
from typing import final

import torch
from torch import Tensor

from dynarank import linalg
from dynarank.factors import FactorPair, balancing_turns, read_pair, to_pair
from dynarank.integrators._tangent import outside
from dynarank.integrators.base import AbstractInPlaceIntegrator, Point, State

UPKEEP = 0.05  # part of a step that balancing may cost
SHORTEST, LONGEST = 10, 100  # steps between balancings
DAMPING = 1e-3  # of the mean square of the rows
BLOCK = 1 << 16  # entries that are worked on at a time: they stay in the cache of a processor


@final
@dataclass(frozen=True)
class GaugeFixed(AbstractInPlaceIntegrator):
    """Scaled gradient descent with Nesterov momentum on ``A`` and ``B``, balanced by Gram matrices now and then.

    In the balanced diagonal gauge ``B B^T`` and ``A A^T`` are both ``Sigma``, so the step ``A - h (B B^T)^-1 A.grad``
    of Riemannian descent, which does not slow down along small singular values, only scales rows. Between balancings
    the gauge is left to itself: rows are scaled by the inverse squares of what their lengths are now, and none moves
    by more than a part of its length. Thus a step costs what it costs without any geometry. Balancing takes products
    of ``r`` rows, and factorisations of ``r x r`` matrices in float64; its interval follows from the rank and the rows
    of a batch, so that it takes about a twentieth of the time, but is ten steps at least, and no longer at first.

    Args:
        rows: About how many rows of inputs meet the layer in a step: samples, or tokens, or pixels.
        clip: Largest move of a row in a step, as a part of its length.
        early: Steps at the beginning with an interval of ten.

    Reference:
        Tong, Ma, Chi, "Accelerating ill-conditioned low-rank matrix estimation via scaled gradient descent", JMLR 2021,
        https://arxiv.org/abs/2005.08898, for the scaling. There it is an inverse of ``r x r`` in every step.
    """

    rows: int = 256
    clip: float = 0.1
    early: int = 300

    typical_lr = 0.1
    keeps_gauge = False

    def __post_init__(self) -> None:
        if self.rows < 1:
            raise ValueError(f"GaugeFixed: rows must be at least 1, got {self.rows}.")
        if not self.clip > 0:
            raise ValueError(f"GaugeFixed: clip must be above 0, got {self.clip}.")
        if self.early < 0:
            raise ValueError(f"GaugeFixed: early must be at least 0, got {self.early}.")

    def interval(self, rank: int, step: int) -> int:
        """Return the steps between balancings: what a balancing costs in steps, over the part that it may cost.

        Example:
            >>> [GaugeFixed().interval(rank, step) for rank, step in ((64, 1000), (320, 0), (320, 1000))]
            [10, 10, 25]
        """
        if step < self.early:
            return SHORTEST
        return max(SHORTEST, min(LONGEST, ceil(rank / self.rows / UPKEEP)))

    def init(self, point: Point) -> State:
        """Return zero momenta."""
        pair = _pair(point)
        A, B = (torch.zeros_like(linalg.widen(factor)) for factor in (pair.A, pair.B))
        return {"A": A, "B": B, "step": torch.zeros(())}

    def advance_(
        self, point: Point, gradient: FactorPair | Tensor, state: State, *, lr: float, momentum: float
    ) -> tuple[Point, State]:
        """Average the gradients, scale rows, step; balance when it is time."""
        pair, slope = _pair(point), _pair(gradient)
        a, b = _squares(pair.A), _squares(pair.B)
        for factor, gradients, average, own, other in (
            (pair.A, slope.A, state["A"], a, b),
            (pair.B, slope.B, state["B"], b, a),
        ):
            scaling, longest = lr / other, self.clip * own.sqrt()  # (r, 1)
            for rows in _blocks(factor):
                g = linalg.widen(gradients[rows])
                average[rows].mul_(momentum).add_(g)
                ahead = torch.add(g, average[rows], alpha=momentum)  # Nesterov
                length = torch.linalg.vector_norm(ahead, dim=-1, keepdim=True)
                factor[rows].addcmul_(ahead, torch.minimum(scaling[rows], longest[rows] / length), value=-1)
        state["step"] += 1
        step = int(state["step"])
        if step % self.interval(pair.rank, step):
            return pair, state
        turns = balancing_turns(pair)
        if turns is None:
            new = to_pair(read_pair(pair))
            return new, self.transport(state, pair, new)
        T_A, T_B = turns
        for matrix, turn in ((pair.A, T_A), (pair.B, T_B), (state["A"], T_B), (state["B"], T_A)):
            _turn_(matrix, turn)
        return pair, state

    def transport(self, state: State, old: Point, new: Point) -> State:
        """Turn the momenta as gradients turn, where the factors were turned by ``A1 = T A``, ``B1 = T^-T B``."""
        old, new = _pair(old), _pair(new)
        T_A, T_B = linalg.turn_between(old.A, new.A), linalg.turn_between(old.B, new.B)
        return {**state, "A": T_B @ state["A"], "B": T_A @ state["B"]}

    def directions(self, state: State, point: Point) -> tuple[Tensor, Tensor]:
        """Return the leading singular directions of the momenta outside the bases."""
        at = read_pair(_pair(point))
        return linalg.svd(outside(at.U, state["A"].mT))[0], linalg.svd(outside(at.V, state["B"].mT))[0]


def _squares(factor: Tensor) -> Tensor:
    """Return the squared lengths of the rows, ``(r, 1)``, damped, and never 0."""
    squares = torch.linalg.vector_norm(factor, dim=-1, keepdim=True).square_()
    return squares.add_(squares.mean(-2, keepdim=True), alpha=DAMPING).clamp_min_(torch.finfo(squares.dtype).tiny)


def _turn_(matrix: Tensor, turn: Tensor) -> None:
    """Multiply by ``turn (r, r)`` from the left, in place."""
    rank, columns = matrix.shape
    width = max(1, BLOCK // rank) if matrix.device.type == "cpu" else columns
    for block in matrix.split(width, dim=-1):
        block.copy_(turn @ block)


def _blocks(factor: Tensor) -> Iterator[slice]:
    """Yield the rows of a factor in blocks that fit into a cache; on other devices than the processor all at once."""
    rank, columns = factor.shape
    block = max(1, BLOCK // columns) if factor.device.type == "cpu" else rank
    return (slice(start, start + block) for start in range(0, rank, block))


def _pair(point: Point | Tensor) -> FactorPair:
    if not isinstance(point, FactorPair):
        raise TypeError("GaugeFixed needs a layer in the pair form, got one in the core form.")
    return point
