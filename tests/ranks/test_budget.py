"""Laws of the budget: never above it, close to it, and what is dense counts as dense."""

from itertools import pairwise

import pytest
import torch

from dynarank import cost
from dynarank.ranks.base import Decision, LayerSpectrum, PlanContext
from dynarank.ranks.budget import Budget

SHAPES = [(30, 20), (8, 40), (7, 5), (64, 64), (50, 10)]
OTHER = 77


def random_spectra(seed: int, *, share: float = 1.0) -> list[LayerSpectrum]:
    generator = torch.Generator().manual_seed(seed)
    spectra = []
    for m, n in SHAPES:
        sigma = torch.rand(max(1, int(share * min(m, n))), generator=generator, dtype=torch.float64)
        spectra.append(LayerSpectrum(f"layer {m}x{n}", sigma.sort(descending=True).values, (m, n)))
    return spectra


def context_of(spectra: list[LayerSpectrum], *, step: int = 0, other: int = OTHER) -> PlanContext:
    return PlanContext(step, sum(s.shape[0] * s.shape[1] for s in spectra) + other, other)


def deployed(spectra: list[LayerSpectrum], plan: list[Decision], other: int = OTHER) -> int:
    """Entries of the deployed model: each layer as two factors or dense, whichever is smaller."""
    return other + sum(min(d.rank * sum(s.shape), s.shape[0] * s.shape[1]) for s, d in zip(spectra, plan, strict=True))


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("share", [0.5, 1.0])
@pytest.mark.parametrize("fraction", [0.12, 0.2, 0.29, 0.5, 0.8, 0.999])
def test_the_deployed_model_fits_and_not_one_direction_more(fraction: float, share: float, seed: int):
    spectra = random_spectra(seed, share=share)
    context = context_of(spectra)
    plan = Budget(fraction).plan(spectra, context)
    spent, budget = deployed(spectra, plan), fraction * context.dense_parameters
    assert spent <= budget
    for spectrum, decision in zip(spectra, plan, strict=True):
        if decision.rank < len(spectrum.sigma):
            m, n = spectrum.shape
            price = cost.deployed_parameters(m, n, decision.rank + 1) - cost.deployed_parameters(m, n, decision.rank)
            assert spent + price > budget, f"{spectrum.name} could have one more"


def test_a_budget_for_everything_keeps_everything():
    spectra = random_spectra(0, share=0.3)
    plan = Budget(0.9).plan(spectra, context_of(spectra))
    assert [d.rank for d in plan] == [len(s.sigma) for s in spectra]


@pytest.mark.parametrize("fraction", [0.13, 0.3])
def test_min_rank_is_kept_everywhere(fraction: float):
    spectra = random_spectra(1)
    spectra[2] = LayerSpectrum("weak", 1e-9 * spectra[2].sigma, spectra[2].shape)
    for min_rank in (1, 2):
        plan = Budget(fraction, min_rank=min_rank).plan(spectra, context_of(spectra))
        assert min(d.rank for d in plan) >= min_rank


def test_a_layer_at_break_even_counts_as_dense_and_further_directions_are_free():
    layer = LayerSpectrum("square", torch.ones(6, dtype=torch.float64), (6, 6))  # rank 3 costs as much as dense
    context = PlanContext(0, 100, 50)
    assert Budget(0.85, min_rank=1).plan([layer], context)[0].rank == 2
    assert Budget(0.86, min_rank=1).plan([layer], context)[0].rank == 6


@pytest.mark.parametrize("dense", [100, 1000, 99_991])
@pytest.mark.parametrize("min_rank", [1, 2])
def test_an_infeasible_budget_names_the_smallest_that_is_feasible(dense: int, min_rank: int):
    flat = torch.ones(3, dtype=torch.float64)
    layers = [LayerSpectrum("one", flat, (7, 5)), LayerSpectrum("two", flat, (4, 9))]
    context = PlanContext(0, dense, dense - 71)
    with pytest.raises(ValueError, match=r"Budget: .* Allow at least [\d.]+% or lower min_rank") as caught:
        Budget(0.01, min_rank=min_rank).plan(layers, context)
    named = float(str(caught.value).split("at least ")[1].split("%")[0]) / 100
    plan = Budget(min(named, 1 - 1e-9), min_rank=min_rank).plan(layers, context)
    assert deployed(layers, plan, context.other_parameters) <= named * dense + 1e-6
    with pytest.raises(ValueError, match="Allow at least"):
        Budget(named - 1.01e-4, min_rank=min_rank).plan(layers, context)


def test_the_schedule_falls_monotonically_from_start_to_fraction():
    policy = Budget(0.1, start=0.8, steps=100)
    allowed = [policy.allowed(step) for step in range(0, 130)]
    assert allowed[0] == pytest.approx(0.8) and allowed[100:] == [0.1] * 30
    assert all(later <= earlier for earlier, later in pairwise(allowed))
    assert {Budget(0.1).allowed(step) for step in (0, 7, 10_000)} == {0.1}


def test_a_plan_follows_the_schedule():
    spectra, policy = random_spectra(2), Budget(0.15, start=0.9, steps=10)
    sizes = [deployed(spectra, policy.plan(spectra, context_of(spectra, step=step))) for step in range(12)]
    assert all(later <= earlier for earlier, later in pairwise(sizes)) and sizes[-1] < sizes[0] / 4


def test_the_reason_names_the_fraction_in_force():
    spectra, policy = random_spectra(2), Budget(0.15, start=0.9, steps=10)
    assert {d.reason for d in policy.plan(spectra, context_of(spectra))} == {"budget 90.0%"}
    assert {d.reason for d in policy.plan(spectra, context_of(spectra, step=10))} == {"budget 15.0%"}
