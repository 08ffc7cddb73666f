"""The bound holds after every step, the weight moves to the nearest one that obeys it, the momentum goes on."""

import pytest
import torch
from torch import Tensor, nn

from dynarank.factors import FactorPair, LowRankFactors
from dynarank.integrators.augmented_bug import AugmentedBUG
from dynarank.integrators.base import AbstractIntegrator
from dynarank.integrators.conditioned import Conditioned, nearest_spectrum
from dynarank.integrators.parallel_bug import ParallelBUG
from dynarank.integrators.plain_factors import PlainFactors
from dynarank.integrators.tangent_heavy_ball import TangentHeavyBall
from dynarank.integrators.tangent_muon import TangentMuon
from dynarank.layers.linear import LowRankLinear
from dynarank.optim.low_rank_optimizer import LowRankOptimizer
from dynarank.ranks.fixed import Fixed

INNER = [TangentMuon(), TangentHeavyBall(), ParallelBUG(), PlainFactors(), AugmentedBUG(coefficient_steps=2)]
SIZES = [(7, 5, 1), (5, 7, 3), (7, 5, 5), (6, 6, 4)]
NAMES = [type(integrator).__name__ for integrator in INNER]


def draw(*shape: int, seed: int = 5) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def nearest_by_search(sigma: Tensor, largest: float) -> Tensor:
    """The best band among very many."""
    bands = torch.linspace(float(sigma[-1]) / 2, float(sigma[0]), 20_001, dtype=torch.float64).unsqueeze(-1)
    candidates = torch.minimum(torch.maximum(sigma, bands), largest * bands)
    return candidates[(candidates - sigma).square().sum(-1).argmin()]


@pytest.mark.parametrize("largest", [1.0, 1.5, 4.0, 20.0])
@pytest.mark.parametrize(
    "sigma", [[3.0], [8.0, 2.0, 0.5], [5.0, 5.0, 1e-9], [9.0, 4.0, 3.0, 2.0, 1.0, 0.1], [1.0, 1.0, 1.0]]
)
def test_the_spectrum_is_the_nearest_within_the_bound(largest: float, sigma: list[float]):
    before = torch.tensor(sigma, dtype=torch.float64)
    after = nearest_spectrum(before, largest=largest)
    assert float(after[0]) <= largest * float(after[-1]) * (1 + 1e-12)
    torch.testing.assert_close(after, nearest_by_search(before, largest), atol=5e-3, rtol=0)
    if before[0] <= largest * before[-1]:
        torch.testing.assert_close(after, before, atol=0, rtol=1e-12)


@pytest.mark.parametrize("inner", INNER, ids=NAMES)
@pytest.mark.parametrize(("m", "n", "rank"), SIZES)
@pytest.mark.parametrize("largest", [1.0, 2.0])
def test_every_pair_obeys_the_bound(inner: AbstractIntegrator, m, n, rank, largest, make_pair, gradient_of):
    integrator = Conditioned(inner, largest=largest)
    point, target = make_pair(m, n, rank), draw(m, n)
    state = integrator.init(point)
    for _ in range(9):
        slope = gradient_of(point, point.to_dense() - target)
        point, state = integrator.advance(point, slope, state, lr=0.02, momentum=0.9, trusted=True)
        if isinstance(point, FactorPair):
            sigma = torch.linalg.svdvals(point.to_dense())[:rank]
            assert float(sigma[0] / sigma[-1]) <= largest * 1.0001


@pytest.mark.parametrize("inner", INNER, ids=NAMES)
@pytest.mark.parametrize(("m", "n", "rank"), SIZES)
def test_one_step_is_the_inner_step_with_the_nearest_spectrum(inner, m, n, rank, make_pair, gradient_of):
    point, G = make_pair(m, n, rank), draw(m, n)
    slope, options = gradient_of(point, G), {"lr": 0.05, "momentum": 0.9, "trusted": True}
    moved, _ = inner.advance(point, slope, inner.init(point), **options)
    limited, _ = Conditioned(inner, largest=1.5).advance(point, slope, inner.init(point), **options)
    W = moved.to_dense()
    if isinstance(moved, FactorPair):
        U, sigma, Vh = torch.linalg.svd(W)
        sigma = nearest_by_search(sigma[:rank], 1.5)
        W = U[:, :rank] @ torch.diag(sigma) @ Vh[:rank]
    torch.testing.assert_close(limited.to_dense(), W, atol=1e-3, rtol=0)


@pytest.mark.parametrize("inner", INNER, ids=NAMES)
def test_a_bound_that_is_never_reached_changes_no_bit(inner, make_pair, gradient_of):
    bounded = Conditioned(inner, largest=1e6)
    point = other = make_pair(7, 5, 3)
    state, known, G = inner.init(point), bounded.init(point), draw(7, 5)
    for _ in range(6):
        options = {"lr": 0.01, "momentum": 0.9, "trusted": True}
        point, state = inner.advance(point, gradient_of(point, G), state, **options)
        other, known = bounded.advance(other, gradient_of(other, G), known, **options)
        assert type(point) is type(other)
        assert all(torch.equal(vars(point)[key], vars(other)[key]) for key in vars(point) if key in "ABUSV")
    assert bounded.keeps_gauge == inner.keeps_gauge


@pytest.mark.parametrize("inner", [TangentMuon(), TangentHeavyBall()], ids=NAMES[:2])
def test_the_momentum_is_the_same_tangent_vector_after_the_clip(inner, make_pair, gradient_of):
    """Clipping keeps the bases, so that the momentum is carried along whole, up to the signs of the bases."""
    point, G = make_pair(7, 5, 3), draw(7, 5)
    options = {"lr": 0.05, "momentum": 0.9, "trusted": True}
    slope = gradient_of(point, G)
    _, kept = inner.advance(point, slope, inner.init(point), **options)
    _, carried = Conditioned(inner, largest=1.2).advance(point, slope, inner.init(point), **options)
    for key, value in kept.items():
        torch.testing.assert_close(carried[key], value, atol=1e-12, rtol=0)


def test_the_core_form_is_not_limited(make_pair, gradient_of):
    inner, point = AugmentedBUG(), make_pair(7, 5, 2)
    slope, options = gradient_of(point, draw(7, 5)), {"lr": 0.05, "momentum": 0.9, "trusted": True}
    inside, _ = Conditioned(inner, largest=1.0).advance(point, slope, {}, **options)
    assert isinstance(inside, LowRankFactors)
    torch.testing.assert_close(inside.to_dense(), inner.advance(point, slope, {}, **options)[0].to_dense())


@pytest.mark.parametrize("largest", [2.0, 5.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_layer_in_training_obeys_it(largest: float, dtype: torch.dtype):
    torch.manual_seed(0)
    layer = LowRankLinear(12, 9, rank=4).to(dtype)
    optimizer = LowRankOptimizer(
        layer, lr=0.02, integrator=Conditioned(TangentMuon(), largest=largest), rank_policy=Fixed()
    )
    x, target = draw(32, 12), draw(9, 12, seed=6) @ torch.diag(torch.logspace(0, -3, 12).double())
    losses = []
    for _ in range(60):
        optimizer.zero_grad()
        loss = nn.functional.mse_loss(layer(x.to(dtype)).double(), x @ target.mT)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
        sigma = layer.factors().sigma
        assert float(sigma[0] / sigma[-1]) < largest * (1.001 if dtype == torch.float32 else 1.02)
    assert losses[-1] < 0.6 * losses[0]


def test_what_is_out_of_range_is_named():
    with pytest.raises(ValueError, match=r"Conditioned: largest must be at least 1, got 0\.5"):
        Conditioned(largest=0.5)
    with pytest.raises(TypeError, match="Conditioned: integrator must be an instance of one, got 'tangent_muon'"):
        Conditioned("tangent_muon")  # type: ignore[arg-type]


def test_an_integrator_of_several_gradients_is_refused():
    class Two(TangentMuon):
        gradients = 2

    with pytest.raises(ValueError, match="must take one gradient a step, but Two takes 2"):
        Conditioned(Two())
