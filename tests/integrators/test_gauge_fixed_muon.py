"""Gauge-fixed Muon against its rule with dense matrices, one factor at a time."""

import pytest
import torch
from torch import Tensor

from dynarank import factors, linalg
from dynarank.factors import FactorPair, LowRankFactors
from dynarank.integrators.gauge_fixed_muon import GaugeFixedMuon

SIZES = [(7, 5, 1), (5, 7, 1), (7, 5, 2), (5, 7, 3), (7, 5, 3), (7, 5, 5), (5, 7, 5)]


def draw(*shape: int, seed: int = 11) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def assert_near(found: Tensor, expected: Tensor, atol: float = 1e-12) -> None:
    torch.testing.assert_close(found, expected, atol=atol, rtol=0)


def spectral_norm(matrix: Tensor) -> float:
    return float(torch.linalg.matrix_norm(matrix, 2))


@pytest.mark.parametrize(("m", "n", "rank"), SIZES)
@pytest.mark.parametrize("step", [0, 1])
def test_a_step_is_the_orthogonalised_one_of_one_factor(make_pair, gradient_of, m, n, rank, step):
    pair, lr, beta = make_pair(m, n, rank), 0.03, 0.9
    G, past = draw(m, n), {"A": draw(rank, m, seed=1), "B": draw(rank, n, seed=2)}
    state = {**past, "step": torch.tensor(float(step))}
    new, after = GaugeFixedMuon().advance(pair, gradient_of(pair, G), state, lr=lr, momentum=beta, trusted=True)
    h = lr * (m / n) ** 0.5
    sigma = torch.linalg.svdvals(pair.to_dense())
    roots = (sigma[:rank] + h).sqrt().diag()
    slopes = {"A": pair.B @ G.mT, "B": pair.A @ G}
    for name in "AB":
        average = slopes[name] + beta * past[name]
        assert_near(after[name], average)
        ahead = torch.linalg.solve(roots, slopes[name] + beta * average)
        moves = (name == "A") == (step == 0)
        turn = h * torch.linalg.solve(roots, linalg.newton_schulz(ahead)) if moves else 0
        assert_near(getattr(new, name), getattr(pair, name) - turn)


@pytest.mark.parametrize(("m", "n"), [(7, 5), (5, 7), (40, 6)])
def test_the_weight_moves_by_about_lr_for_each_factor(make_pair, gradient_of, m, n):
    pair, lr = make_pair(m, n, 3), 1e-4
    for size in (1e-20, 1.0, 1e20):
        point, state = pair, GaugeFixedMuon().init(pair)
        for _ in range(2):
            slope, before = gradient_of(point, size * draw(m, n)), point.to_dense()
            point, state = GaugeFixedMuon().advance(point, slope, state, lr=lr, momentum=0.9, trusted=True)
            assert 0.5 < spectral_norm(point.to_dense() - before) / (lr * (m / n) ** 0.5) < 1.3


def test_a_new_direction_grows_within_a_few_bounded_steps(make_pair, gradient_of):
    at, lr = factors.read_balanced(make_pair(7, 5, 3)), 0.05
    point = factors.to_pair(LowRankFactors(at.U, at.S * torch.tensor([1.0, 1.0, 0.0]).double(), at.V))
    assert float(factors.read_balanced(point).sigma[2]) < 1e-7
    state = GaugeFixedMuon().init(point)
    for _ in range(4):
        slope, before = gradient_of(point, -at.to_dense()), point.to_dense()
        point, state = GaugeFixedMuon().advance(point, slope, state, lr=lr, momentum=0.9, trusted=True)
        assert spectral_norm(point.to_dense() - before) < 1.5 * lr * (7 / 5) ** 0.5
    assert float(factors.read_pair(point).sigma[2]) > lr


def test_it_learns_in_any_gauge_and_balances(make_pair, gradient_of):
    balanced, method, target = make_pair(9, 8, 4), GaugeFixedMuon(), draw(9, 4) @ draw(4, 8, seed=3) / 4
    T = torch.diag(torch.logspace(-1, 1, 4, dtype=torch.float64)) @ torch.linalg.qr(draw(4, 4))[0]
    pair = FactorPair(T @ balanced.A, torch.linalg.inv(T).mT @ balanced.B)
    state = method.init(pair)
    for step in range(600):
        slope = gradient_of(pair, pair.to_dense() - target)
        pair, state = method.advance(pair, slope, state, lr=0.08 * 0.99**step, momentum=0.9, trusted=True)
    assert spectral_norm(pair.to_dense() - target) < 1e-2 * spectral_norm(target)
    assert_near(pair.A @ pair.A.mT, pair.B @ pair.B.mT, atol=1e-9)  # 600 is a multiple of every interval here


@pytest.mark.parametrize(("options", "message"), [({"rows": 0}, "rows must be"), ({"early": -1}, "early must be")])
def test_options_out_of_range_are_refused(options, message):
    with pytest.raises(ValueError, match=f"GaugeFixedMuon: {message}"):
        GaugeFixedMuon(**options)
