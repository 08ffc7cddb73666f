"""Steps on two factors, in place, whose gauge is put right now and then by Gram matrices."""

from abc import abstractmethod
from dataclasses import dataclass
from math import ceil

import torch
from torch import Tensor

from dynarank import linalg
from dynarank.factors import FactorPair, balancing_turns, read_pair, to_pair
from dynarank.integrators._tangent import outside
from dynarank.integrators.base import AbstractInPlaceIntegrator, Point, State

UPKEEP = 0.05  # part of a step that balancing may cost
SHORTEST, LONGEST = 10, 100  # steps between balancings
BLOCK = 1 << 16  # entries that are worked on at a time: they stay in the cache of a processor


@dataclass(frozen=True)
class AbstractGaugeFixed(AbstractInPlaceIntegrator):
    """Moves ``A`` and ``B`` by their own averaged gradients, and balances them when it is time.

    In the balanced diagonal gauge ``B B^T`` and ``A A^T`` are both ``Sigma``, so what a geometric step divides by is
    diagonal. Between balancings the gauge is left to itself, and the squared lengths of the rows stand for ``Sigma``.
    Balancing takes products of ``r`` rows, and factorisations of ``r x r`` matrices in float64; its interval follows
    from the sizes and the rows of a batch, so that it takes about a twentieth of the time, but is ten steps at least,
    and no longer at first. A subclass writes ``move_``.

    Args:
        rows: About how many rows of inputs meet the layer in a step: samples, or tokens, or pixels.
        early: Steps at the beginning with an interval of ten.
    """

    rows: int = 256
    early: int = 300

    keeps_gauge = False

    def __post_init__(self) -> None:
        if self.rows < 1:
            raise ValueError(f"{type(self).__name__}: rows must be at least 1, got {self.rows}.")
        if self.early < 0:
            raise ValueError(f"{type(self).__name__}: early must be at least 0, got {self.early}.")

    @abstractmethod
    def move_(
        self, pair: FactorPair, gradient: FactorPair, averages: FactorPair, *, step: int, lr: float, momentum: float
    ) -> None:
        """Add the gradients to the averages and move the pair, both in place."""

    def interval(self, shape: tuple[int, int], rank: int, step: int) -> int:
        """Return the steps between balancings: what a balancing costs in steps, over the part that it may cost."""
        if step < self.early:
            return SHORTEST
        return max(SHORTEST, min(LONGEST, ceil(self.cost(shape, rank) / UPKEEP)))

    def cost(self, shape: tuple[int, int], rank: int) -> float:
        """Return about how many steps of its layer a balancing costs, as times on one CPU say.

        Products cost 0.6 rank / rows, factorisations 25 rank^2 / (rows (m + n)).
        """
        return rank / self.rows * (0.6 + 25 * rank / sum(shape))

    def init(self, point: Point) -> State:
        """Return zero momenta."""
        pair = self._pair(point)
        A, B = (torch.zeros_like(linalg.widen(factor)) for factor in (pair.A, pair.B))
        return {"A": A, "B": B, "step": torch.zeros(())}

    def advance_(
        self, point: Point, gradient: FactorPair | Tensor, state: State, *, lr: float, momentum: float
    ) -> tuple[Point, State]:
        """Move the pair; balance when it is time."""
        pair, averages = self._pair(point), FactorPair(state["A"], state["B"])
        step = int(state["step"])
        self.move_(pair, self._pair(gradient), averages, step=step, lr=lr, momentum=momentum)
        state["step"] += 1
        step += 1
        if step % self.interval(pair.shape, pair.rank, step):
            return pair, state
        return self.balance_(pair, state)

    def balance_(self, pair: FactorPair, state: State) -> tuple[FactorPair, State]:
        """Return the same weight in the balanced gauge, and the momenta there, over those given where rows allow it."""
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
        old, new = self._pair(old), self._pair(new)
        T_A, T_B = linalg.turn_between(old.A, new.A), linalg.turn_between(old.B, new.B)
        return {**state, "A": T_B @ state["A"], "B": T_A @ state["B"]}

    def directions(self, state: State, point: Point) -> tuple[Tensor, Tensor]:
        """Return the leading singular directions of the momenta outside the bases."""
        at = read_pair(self._pair(point))
        return linalg.svd(outside(at.U, state["A"].mT))[0], linalg.svd(outside(at.V, state["B"].mT))[0]

    def _pair(self, point: Point | Tensor) -> FactorPair:
        if not isinstance(point, FactorPair):
            raise TypeError(f"{type(self).__name__} needs a layer in the pair form, got one in the core form.")
        return point


def _turn_(matrix: Tensor, turn: Tensor) -> None:
    """Multiply by ``turn (r, r)`` from the left, in place."""
    rank, columns = matrix.shape
    width = max(1, BLOCK // rank) if matrix.device.type == "cpu" else columns
    for block in matrix.split(width, dim=-1):
        block.copy_(turn @ block)
