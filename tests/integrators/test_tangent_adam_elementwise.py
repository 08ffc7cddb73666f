"""Adam on coordinates in the frame of the singular vectors: one dense step, and how second moments follow the frame."""

from typing import Any

import pytest
import torch
from torch import Tensor

from dynarank import factors
from dynarank.factors import FactorPair, LowRankFactors
from dynarank.integrators._tangent import TangentVector, transport
from dynarank.integrators.base import State
from dynarank.integrators.tangent_adam_elementwise import TangentAdamElementwise

SIZES = [(7, 5, 1), (5, 7, 1), (7, 5, 3), (5, 7, 3), (7, 5, 5), (5, 7, 5)]
SQUARES = ("S_squares", "Up_squares", "Vp_squares")


def draw(*shape: int, seed: int = 11) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def assert_near(found: Tensor, expected: Tensor, atol: float = 1e-12) -> None:
    torch.testing.assert_close(found, expected, atol=atol, rtol=0)


def run(pair: FactorPair, gradient_of: Any, steps: int = 20) -> tuple[FactorPair, State]:
    """A pair and a state some noisy steps on."""
    method, state = TangentAdamElementwise(), TangentAdamElementwise().init(pair)
    for step in range(steps):
        slope = gradient_of(pair, pair.to_dense() + draw(*pair.shape, seed=step))
        pair, state = method.advance(pair, slope, state, lr=0.02, momentum=0.9, trusted=True)
    return pair, state


@pytest.mark.parametrize(("m", "n", "rank"), SIZES)
def test_the_first_step_divides_every_coordinate_by_its_size(make_pair, gradient_of, project, m, n, rank):
    pair, G, lr, eps = make_pair(m, n, rank), draw(m, n), 0.1, 0.3
    method = TangentAdamElementwise(eps=eps)
    new, _ = method.advance(pair, gradient_of(pair, G), method.init(pair), lr=lr, momentum=0.9, trusted=True)
    at, W = factors.read_balanced(pair), pair.to_dense()
    S, Up, Vp = at.U.mT @ G @ at.V, G @ at.V - at.U @ at.U.mT @ G @ at.V, G.mT @ at.U - at.V @ at.V.mT @ G.mT @ at.U
    S, Up, Vp = (part / (part.abs() + eps) for part in (S, Up, Vp))
    D = at.U @ S @ at.V.mT + project(W, rank, Up @ at.V.mT) + project(W, rank, at.U @ Vp.mT)
    D = D - at.U @ (at.U.mT @ Up) @ at.V.mT - at.U @ (Vp.mT @ at.V) @ at.V.mT  # outside the bases only
    Y = W - lr * D
    U1, V1 = torch.linalg.qr(Y @ at.V)[0], torch.linalg.qr(Y.mT @ at.U)[0]
    assert_near(new.to_dense(), U1 @ U1.mT @ Y @ V1 @ V1.mT)


@pytest.mark.parametrize(("m", "n", "rank"), SIZES)
def test_second_moments_are_never_negative(make_pair, gradient_of, m, n, rank):
    here, state = run(make_pair(m, n, rank), gradient_of)
    assert all(bool((state[name] >= 0).all()) for name in SQUARES)
    for new_rank in range(1, min(m, n) + 1):
        there = factors.to_pair(factors.from_dense(here.to_dense() + draw(m, n), rank=new_rank))
        carried = TangentAdamElementwise().transport(state, here, there)
        assert all(bool((carried[name] >= 0).all()) for name in SQUARES)


def turned(pair: FactorPair, turn: Tensor) -> FactorPair:
    return FactorPair(turn @ pair.A, turn @ pair.B)


@pytest.mark.parametrize(("m", "n", "rank"), [(7, 5, 3), (5, 7, 5)])
def test_signs_and_order_of_the_vectors_do_not_matter(make_pair, gradient_of, m, n, rank):
    here, state = run(make_pair(m, n, rank), gradient_of)
    eye = torch.eye(rank, dtype=torch.float64)
    for turn in (torch.diag(draw(rank).sign()), eye.roll(1, 0), eye.roll(1, 0) * draw(rank, 1).sign()):
        there = turned(here, turn)
        carried = TangentAdamElementwise().transport(state, here, there)
        assert_near(carried["S_squares"], turn.abs() @ state["S_squares"] @ turn.abs().mT)
        ends = [
            TangentAdamElementwise().advance(p, gradient_of(p, draw(m, n)), s, lr=0.1, momentum=0.9, trusted=True)[0]
            for p, s in ((here, state), (there, carried))
        ]
        assert_near(ends[1].to_dense(), ends[0].to_dense())


@pytest.mark.parametrize("rank", [1, 3, 5])
def test_a_single_coordinate_is_carried_as_its_square(make_pair, rank):
    old = factors.read_balanced(make_pair(7, 5, 3))
    new = factors.from_dense(old.to_dense() + 0.3 * draw(7, 5), rank=rank)
    method = TangentAdamElementwise()
    for i, j in ((0, 0), (1, 2)):
        S = torch.zeros(3, 3, dtype=torch.float64)
        S[i, j] = 1.7
        single = TangentVector(S, torch.zeros(7, 3).double(), torch.zeros(5, 3).double())
        carried = method.carry(method.squares(old, single), old, new)
        for name, square in method.squares(new, transport(single, old, new)).items():
            assert_near(carried[name], square)


def test_moments_outside_the_bases_come_in_with_a_new_direction(make_pair, gradient_of):
    here, state = run(make_pair(7, 5, 2), gradient_of)
    at = factors.read_balanced(here)
    left, right = TangentAdamElementwise().directions(state, here)
    grown = factors.augment(at, left=left[:, :1], right=right[:, :1])
    carried = TangentAdamElementwise().transport(state, here, factors.to_pair(grown))
    assert_near(carried["S_squares"][:2, :2], state["S_squares"])
    assert_near(carried["S_squares"][2, :2], left[:, 0].square() @ state["Up_squares"])
    assert_near(carried["S_squares"][:2, 2], right[:, 0].square() @ state["Vp_squares"])


def test_where_singular_values_are_equal_the_step_depends_on_the_frame(gradient_of):
    U, V = (torch.linalg.qr(draw(size, 3, seed=size))[0] for size in (7, 5))
    pair = factors.to_pair(LowRankFactors(U, torch.eye(3, dtype=torch.float64), V))
    other = turned(pair, torch.linalg.qr(draw(3, 3))[0])
    assert_near(other.to_dense(), pair.to_dense())
    method, G = TangentAdamElementwise(), draw(7, 5)
    ends = [
        method.advance(p, gradient_of(p, G), method.init(p), lr=0.1, momentum=0.9, trusted=True)[0].to_dense()
        for p in (pair, other)
    ]
    assert float((ends[1] - ends[0]).norm()) > 0.01
