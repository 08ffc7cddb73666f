"""Gauge-fixed descent is scaled gradient descent on two factors, whose balancing leaves the weight alone."""

import pytest
import torch

from dynarank import factors
from dynarank.factors import FactorPair, LowRankFactors
from dynarank.integrators import gauge_fixed
from dynarank.integrators.gauge_fixed import DAMPING, GaugeFixed
from dynarank.integrators.plain_factors import PlainFactors

SIZES = [(7, 5, 1), (5, 7, 3), (7, 5, 5), (90, 70, 20)]


def draw(*shape: int, seed: int = 5) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def turned(pair: FactorPair) -> FactorPair:
    """Return the same weight in another gauge, of moderate condition."""
    T = torch.eye(pair.rank, dtype=torch.float64) + 0.2 * draw(pair.rank, pair.rank, seed=9) / pair.rank**0.5
    return FactorPair(T @ pair.A, torch.linalg.inv(T).mT @ pair.B)


@pytest.mark.parametrize(("m", "n", "rank"), SIZES)
@pytest.mark.parametrize("block", [1, 1 << 16])
def test_a_step_is_scaled_gradient_descent(make_pair, gradient_of, monkeypatch, m, n, rank, block):
    monkeypatch.setattr(gauge_fixed, "BLOCK", block)
    pair, lr = turned(make_pair(m, n, rank)), 1e-4
    slope, state = gradient_of(pair, draw(m, n)), {"A": draw(rank, m, seed=1), "B": draw(rank, n, seed=2)}
    method = GaugeFixed(clip=1e9)
    new, after = method.advance(pair, slope, {**state, "step": torch.zeros(())}, lr=lr, momentum=0.9, trusted=True)
    lengths = {"A": pair.B.square().sum(1), "B": pair.A.square().sum(1)}
    for name in "AB":
        average = getattr(slope, name) + 0.9 * state[name]
        ahead = getattr(slope, name) + 0.9 * average
        scale = lengths[name] + DAMPING * lengths[name].mean()
        torch.testing.assert_close(
            getattr(new, name), getattr(pair, name) - lr * ahead / scale[:, None], atol=1e-12, rtol=0
        )
        torch.testing.assert_close(after[name], average, atol=1e-12, rtol=0)


def test_no_row_moves_by_more_than_a_part_of_its_length(make_pair, gradient_of):
    pair = make_pair(9, 8, 4)
    slope = gradient_of(pair, 1e6 * draw(9, 8))
    new, _ = GaugeFixed().advance(pair, slope, GaugeFixed().init(pair), lr=1.0, momentum=0.0, trusted=True)
    for name in "AB":
        moved = (getattr(new, name) - getattr(pair, name)).norm(dim=1)
        squares = getattr(pair, name).square().sum(1)
        torch.testing.assert_close(moved, 0.1 * (squares + DAMPING * squares.mean()).sqrt())


@pytest.mark.parametrize(("m", "n", "rank"), SIZES)
def test_balancing_leaves_the_weight_and_the_directions_of_descent(make_pair, gradient_of, m, n, rank):
    pair, G = turned(make_pair(m, n, rank)), draw(m, n)
    slope = gradient_of(pair, G)
    T_A, T_B = factors.balancing_turns(pair)
    new = FactorPair(T_A @ pair.A, T_B @ pair.B)
    torch.testing.assert_close(new.to_dense(), pair.to_dense(), atol=1e-12, rtol=0)
    sigma = torch.linalg.svdvals(pair.to_dense())[:rank].diag()
    torch.testing.assert_close(new.A @ new.A.mT, sigma, atol=1e-12, rtol=0)
    torch.testing.assert_close(new.B @ new.B.mT, sigma, atol=1e-12, rtol=0)
    # Momenta turn as gradients do: what was the gradient of A is that of T_A A.
    there = gradient_of(new, G)
    carried = GaugeFixed().transport({"A": slope.A, "B": slope.B, "step": torch.zeros(())}, pair, new)
    for name, turn in (("A", T_B), ("B", T_A)):
        torch.testing.assert_close(turn @ getattr(slope, name), getattr(there, name), atol=1e-11, rtol=0)
        torch.testing.assert_close(carried[name], getattr(there, name), atol=1e-11, rtol=0)


def test_balancing_in_float32_leaves_the_weight_to_rounding():
    pair = FactorPair(draw(60, 300, seed=1).float(), draw(60, 200, seed=2).float() * torch.logspace(0, -6, 60)[:, None])
    T_A, T_B = factors.balancing_turns(pair)
    before, after = pair.to_dense(), (T_A @ pair.A).mT @ (T_B @ pair.B)
    assert float((after - before).norm()) < 2e-6 * float(before.norm())


def test_rows_that_depend_on_each_other_are_balanced_all_the_same(gradient_of):
    pair = FactorPair(draw(3, 8, seed=1), draw(3, 6, seed=2))
    pair.A[2] = pair.A[1]
    assert factors.balancing_turns(pair) is None
    method = GaugeFixed()
    state = {**method.init(pair), "step": torch.tensor(9.0)}
    new, after = method.advance(pair, gradient_of(pair, 0 * draw(8, 6)), state, lr=0.1, momentum=0.9, trusted=True)
    torch.testing.assert_close(new.to_dense(), pair.to_dense(), atol=1e-7, rtol=0)  # the floor of what was lost
    torch.testing.assert_close(new.A @ new.A.mT, new.B @ new.B.mT, atol=1e-7, rtol=0)
    assert int(after["step"]) == 10


def test_the_interval_follows_the_rank_and_the_rows_of_a_batch():
    many, few = GaugeFixed(rows=4096), GaugeFixed(rows=64)
    wide = (5120, 5120)
    assert [method.interval(wide, 160, 5000) for method in (many, GaugeFixed(), few)] == [10, 13, 50]
    assert few.interval(wide, 160, 10) == 10 and GaugeFixed(rows=64, early=0).interval(wide, 160, 10) == 50
    assert GaugeFixed().interval((2048, 2048), 320, 5000) == 64  # factorisations count where the rank is no small part
    assert few.interval(wide, 5000, 5000) == 100


def test_the_gauge_is_put_right_at_the_interval(make_pair, gradient_of):
    pair, method = make_pair(9, 8, 4), GaugeFixed()
    state, unbalanced = method.init(pair), []
    for _ in range(2 * method.interval((9, 8), 4, 0)):
        slope = gradient_of(pair, pair.to_dense() - draw(9, 8, seed=3))
        pair, state = method.advance(pair, slope, state, lr=0.01, momentum=0.9, trusted=True)
        unbalanced.append(not torch.allclose(pair.A @ pair.A.mT, pair.B @ pair.B.mT, atol=1e-10, rtol=0))
    assert unbalanced == 2 * [*(method.interval((9, 8), 4, 0) - 1) * [True], False]


def test_small_singular_values_learn_as_fast_as_large_ones():
    bases = [torch.linalg.qr(draw(30, 6, seed=seed))[0] for seed in (1, 2)]
    target = LowRankFactors(bases[0], torch.logspace(0, -3, 6, dtype=torch.float64).diag(), bases[1]).to_dense()
    start = factors.to_pair(factors.from_dense(target + 1e-4 * draw(30, 30, seed=3), rank=6))
    errors = []
    for method, lr in ((GaugeFixed(), 0.3), (PlainFactors(), 0.3)):
        pair, state = start, method.init(start)
        for _ in range(60):
            residual = pair.to_dense() - target
            slope = FactorPair(pair.B @ residual.mT, pair.A @ residual)
            pair, state = method.advance(pair, slope, state, lr=lr, momentum=0.5, trusted=True)
        errors.append(float((pair.to_dense() - target).norm()))
    assert errors[0] < 1e-3 * errors[1]


def test_a_step_in_place_is_the_same_step(make_pair, gradient_of):
    pair, method = make_pair(9, 8, 4), GaugeFixed()
    slope, state = gradient_of(pair, draw(9, 8)), method.init(pair)
    expected, kept = method.advance(pair, slope, state, lr=0.1, momentum=0.9, trusted=True)
    A, M = pair.A.clone(), state["A"]
    here = FactorPair(A, pair.B.clone())
    point, after = method.advance_(here, slope, state, lr=0.1, momentum=0.9)
    assert point.A is A and after["A"] is M
    torch.testing.assert_close(point.A, expected.A, atol=0, rtol=0)
    torch.testing.assert_close(after, kept, atol=0, rtol=0)


@pytest.mark.parametrize(
    ("options", "message"),
    [({"rows": 0}, "rows must be at least 1"), ({"clip": 0.0}, "above 0"), ({"early": -1}, "early must be at least 0")],
)
def test_options_out_of_range_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        GaugeFixed(**options)
