"""Spectron: orthogonalised momentum on each of the two factors, and a step that bounds the change of the product."""

import torch
from torch import Tensor

from dynarank import linalg
from dynarank.factors import FactorPair
from dynarank.integrators.base import AbstractIntegrator, Point, State


class Spectron(AbstractIntegrator):
    """Steps along the polar factors of the momenta of ``A`` and ``B``, of size ``lr / (|A| + |B| + 1)``.

    With spectral norms ``|A|`` and ``|B|`` the weight then changes by at most ``lr`` in spectral norm, up to the
    accuracy of Newton and Schulz's iteration. The norms come from one step of power iteration each, warm from the step
    before. The factors are taken as they are: the step of ``W`` depends on how it is split into them. Momenta and
    vectors are kept in at least float32.

    Reference:
        Janson, Oyallon, Belilovsky, "Stabilizing native low-rank LLM pretraining", 2026,
        https://arxiv.org/abs/2602.12429, algorithms 1 and 3. There the power iteration starts from a random vector,
        here from the longest row of the factor, which is exact in the balanced diagonal gauge.
    """

    keeps_gauge = False

    def init(self, point: Point) -> State:
        """Return zero momenta, and zero for vectors that are not known yet."""
        pair = _widened(point)
        left, right = (torch.zeros_like(factor[..., 0, :]) for factor in (pair.A, pair.B))
        return {"A": torch.zeros_like(pair.A), "B": torch.zeros_like(pair.B), "left": left, "right": right}

    def advance(
        self, point: Point, gradient: FactorPair | Tensor, state: State, *, lr: float, momentum: float, trusted: bool
    ) -> tuple[Point, State]:
        """Average the gradients of the factors, measure the factors, step against the polar factors."""
        pair, slope = _widened(point), _widened(gradient)
        A, B = slope.A + momentum * state["A"], slope.B + momentum * state["B"]
        norm_A, left = power_step(pair.A, state["left"])
        norm_B, right = power_step(pair.B, state["right"])
        size = (lr / (norm_A + norm_B + 1)).unsqueeze(-1).unsqueeze(-1)
        moved = FactorPair(pair.A - size * linalg.newton_schulz(A), pair.B - size * linalg.newton_schulz(B))
        return moved, {"A": A, "B": B, "left": left, "right": right}

    def transport(self, state: State, old: Point, new: Point) -> State:
        """Turn each momentum as its factor was turned; the vectors are not in the space that turns."""
        before, after = _widened(old), _widened(new)
        A, B = linalg.turn_between(before.A, after.A) @ state["A"], linalg.turn_between(before.B, after.B) @ state["B"]
        return {**state, "A": A, "B": B}

    def directions(self, state: State, point: Point) -> None:
        """None are known; the caller draws random ones."""


def power_step(factor: Tensor, vector: Tensor) -> tuple[Tensor, Tensor]:
    """Return an estimate of the spectral norm from below and a better vector, of unit length.

    Shape:
        ``factor (r, m)``, ``vector (m,)``, all zero where none is known; the norm is a scalar.
    """
    longest = linalg.row_norms(factor).argmax(-1)[..., None, None]
    row = torch.take_along_dim(factor, longest, dim=-2).squeeze(-2)
    start = _unit(torch.where(vector.any(-1, keepdim=True), vector, row)).unsqueeze(-1)
    ahead = _unit((factor @ start).squeeze(-1)).unsqueeze(-1)  # (r, 1)
    back = (factor.mT @ ahead).squeeze(-1)  # (m,)
    return linalg.row_norms(back), _unit(back)


def _unit(vector: Tensor) -> Tensor:
    return vector / linalg.row_norms(vector).clamp_min(torch.finfo(vector.dtype).tiny).unsqueeze(-1)


def _widened(pair: Point | Tensor) -> FactorPair:
    if not isinstance(pair, FactorPair):
        raise TypeError("Spectron needs a layer in the pair form, got one in the core form.")
    return FactorPair(linalg.widen(pair.A), linalg.widen(pair.B))
