"""Plain factor training is torch's SGD on the two factors."""

import pytest
import torch

from dynarank import factors
from dynarank.factors import FactorPair
from dynarank.integrators.plain_factors import PlainFactors


def draw(*shape: int, seed: int = 5) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@pytest.mark.parametrize(("m", "n", "rank"), [(7, 5, 1), (5, 7, 3), (7, 5, 5)])
@pytest.mark.parametrize("momentum", [0.0, 0.9])
def test_steps_are_those_of_torch_sgd(make_pair, gradient_of, m, n, rank, momentum):
    point, target = make_pair(m, n, rank), draw(m, n)
    A, B = (torch.nn.Parameter(factor.clone()) for factor in (point.A, point.B))
    sgd = torch.optim.SGD([A, B], lr=0.02, momentum=momentum, nesterov=momentum > 0)
    state = PlainFactors().init(point)
    for _ in range(50):
        slope = gradient_of(point, point.to_dense() - target)
        point, state = PlainFactors().advance(point, slope, state, lr=0.02, momentum=momentum, trusted=True)
        sgd.zero_grad()
        (0.5 * (A.mT @ B - target).square().sum()).backward()
        sgd.step()
    torch.testing.assert_close(point.A, A.detach(), atol=1e-12, rtol=0)
    torch.testing.assert_close(point.B, B.detach(), atol=1e-12, rtol=0)


def test_a_rotated_gauge_takes_the_same_steps(make_pair, gradient_of):
    here, G = make_pair(7, 5, 3), draw(7, 5)
    state = {"A": draw(3, 7, seed=1), "B": draw(3, 5, seed=2)}
    Q = torch.linalg.qr(draw(3, 3))[0]
    there = FactorPair(Q @ here.A, Q @ here.B)
    carried = PlainFactors().transport(state, here, there)
    steps = [
        PlainFactors().advance(point, gradient_of(point, G), known, lr=0.1, momentum=0.9, trusted=True)[0].to_dense()
        for point, known in ((here, state), (there, carried))
    ]
    torch.testing.assert_close(steps[1], steps[0], atol=1e-12, rtol=0)


def test_momentum_of_kept_directions_survives_and_new_ones_start_at_rest(make_pair):
    here = make_pair(7, 5, 3)
    state = {"A": draw(3, 7, seed=1), "B": draw(3, 5, seed=2)}
    W = factors.read_balanced(here)
    left, right = (torch.linalg.qr(torch.cat([b, draw(len(b), 1)], -1))[0][:, 3:] for b in (W.U, W.V))
    grown = factors.to_pair(factors.augment(W, left=left, right=right))
    carried = PlainFactors().transport(state, here, grown)
    for name in "AB":
        torch.testing.assert_close(carried[name][:3], state[name], atol=1e-12, rtol=0)
        torch.testing.assert_close(carried[name][3], torch.zeros_like(carried[name][3]), atol=1e-6, rtol=0)
    cut = factors.to_pair(factors.truncate(W, rank=2))
    for name, kept in PlainFactors().transport(state, here, cut).items():
        torch.testing.assert_close(kept, state[name][:2], atol=1e-12, rtol=0)


def test_the_core_form_is_refused(make_pair):
    core = factors.read_balanced(make_pair(7, 5, 2))
    with pytest.raises(TypeError, match="PlainFactors needs a layer in the pair form"):
        PlainFactors().init(core)
