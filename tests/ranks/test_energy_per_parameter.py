"""The budget buys the energy that is cheapest, by a greedy search written out here, and knows when dense is cheaper."""

import itertools

import pytest
import torch

from dynarank import cost
from dynarank.ranks.base import LayerSpectrum, PlanContext
from dynarank.ranks.energy_per_parameter import EnergyPerParameter


def layer(name: str, sigma: list[float], shape: tuple[int, int]) -> LayerSpectrum:
    return LayerSpectrum(name, torch.tensor(sigma, dtype=torch.float64), shape)


def ranks(policy: EnergyPerParameter, layers: list[LayerSpectrum], *, dense: int) -> list[int]:
    return [d.rank for d in policy.plan(layers, PlanContext(0, dense, 0))]


def energy(layers: list[LayerSpectrum], kept: tuple[int, ...] | list[int], *, relative: bool) -> float:
    """The energy that is kept; a layer that is dense keeps all of its own."""
    total = 0.0
    for s, rank in zip(layers, kept, strict=True):
        dense = cost.factor_parameters(*s.shape, rank) >= cost.dense_parameters(*s.shape)
        part = float(s.sigma[: len(s.sigma) if dense else rank].square().sum())
        total += part / float(s.sigma.square().sum()) if relative else part
    return total


def random_layers(seed: int) -> list[LayerSpectrum]:
    generator = torch.Generator().manual_seed(seed)
    found = []
    for m, n in ((12, 9), (6, 14), (20, 20)):
        sigma = torch.rand(6, generator=generator, dtype=torch.float64).sort(descending=True).values
        found.append(LayerSpectrum(f"{m}x{n}", 2 * sigma**2, (m, n)))
    return found


@pytest.mark.parametrize("relative", [True, False])
@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("fraction", [0.2, 0.35, 0.5, 0.7])
def test_it_keeps_nearly_the_most_energy_that_any_ranks_could(relative: bool, seed: int, fraction: float):
    layers = random_layers(seed)
    dense = sum(cost.dense_parameters(*s.shape) for s in layers)
    found = ranks(EnergyPerParameter(fraction, min_rank=1, relative=relative), layers, dense=dense)
    best = 0.0
    for kept in itertools.product(range(1, 7), repeat=3):
        price = sum(cost.deployed_parameters(*s.shape, rank) for s, rank in zip(layers, kept, strict=True))
        if price <= fraction * dense:
            best = max(best, energy(layers, kept, relative=relative))
    spent = sum(cost.deployed_parameters(*s.shape, rank) for s, rank in zip(layers, found, strict=True))
    assert spent <= fraction * dense
    assert energy(layers, found, relative=relative) >= 0.95 * best


def test_small_layers_win_at_equal_energy():
    layers = [layer("large", [1.0] * 4, (100, 100)), layer("small", [1.0] * 4, (10, 10))]
    assert ranks(EnergyPerParameter(0.05, min_rank=1), layers, dense=10_100) == [2, 4]


def test_relative_energy_does_not_see_the_scale_of_a_layer_and_absolute_does():
    steep, flat = layer("steep", [1.0, 0.1, 0.01], (30, 30)), layer("flat", [90.0, 80.0, 70.0], (30, 30))
    for factor in (1.0, 1e-6):
        scaled = LayerSpectrum("flat", factor * flat.sigma, flat.shape)
        assert ranks(EnergyPerParameter(0.14, min_rank=1), [steep, scaled], dense=1800) == [1, 3]
    tiny = LayerSpectrum("flat", 1e-6 * flat.sigma, flat.shape)
    assert ranks(EnergyPerParameter(0.14, min_rank=1, relative=False), [steep, tiny], dense=1800) == [3, 1]


def test_the_step_to_dense_brings_all_that_is_left():
    """Rank 3 makes a 6 x 6 layer dense: the 24 parameters from rank 1 to there buy five directions, not two."""
    square = layer("square", [2.0, 1.0, 1.0, 1.0, 1.0, 1.0], (6, 6))
    long = layer("long", [2.0, 1.1, 1.1], (6, 6))
    policy = EnergyPerParameter(0.9, min_rank=1, relative=False)
    assert ranks(policy, [square, long], dense=72) == [6, 2]  # 36 + 24 of 64.8: the rest of square before that of long
    worth = policy.worth(square)
    assert bool((worth.diff() <= 0).all())
    assert worth.tolist() == pytest.approx([4 / 12, *[5 / 24] * 5])


def test_what_both_budgets_share_names_its_owner():
    with pytest.raises(ValueError, match="EnergyPerParameter: fraction must be between 0 and 1, got 2"):
        EnergyPerParameter(2.0)
    with pytest.raises(ValueError, match=r"EnergyPerParameter: 100 dense parameters .* Allow at least 24.00%"):
        ranks(EnergyPerParameter(0.01), [layer("one", [1.0, 1.0], (6, 6))], dense=100)
    assert EnergyPerParameter(0.1, start=0.5, steps=10).allowed(0) == pytest.approx(0.5)
