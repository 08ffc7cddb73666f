"""What every rank policy obeys, whatever its rule: run on all that discovery finds."""

import dataclasses
from collections.abc import Callable

import pytest
import torch

from dynarank._discovery import discover
from dynarank.ranks.absolute_tail import AbsoluteTail
from dynarank.ranks.base import AbstractRankPolicy, Decision, LayerSpectrum, PlanContext, candidates
from dynarank.ranks.budget import Budget
from dynarank.ranks.estimated_noise_edge import EstimatedNoiseEdge
from dynarank.ranks.fixed import Fixed
from dynarank.ranks.fraction import Fraction
from dynarank.ranks.noise_edge import NoiseEdge
from dynarank.ranks.relative_tail import RelativeTail
from dynarank.ranks.retained_energy import RetainedEnergy
from dynarank.ranks.sigma_cutoff import SigmaCutoff
from dynarank.ranks.signal_energy import SignalEnergy
from dynarank.ranks.variance_ratio import VarianceRatio

POLICIES = discover("dynarank.ranks", AbstractRankPolicy)
SHARED = {"budget", "energy_per_parameter"}  # policies in which layers compete; in all others each layer decides alone
SHAPES = [(30, 20), (8, 40), (7, 5), (5, 7), (64, 64), (1, 9)]


def build(name: str) -> AbstractRankPolicy:
    """Build a policy from its defaults; what has none is a fraction, and a half is in range."""
    fields = dataclasses.fields(POLICIES[name])
    return POLICIES[name](**{f.name: 0.5 for f in fields if f.default is f.default_factory is dataclasses.MISSING})


def falling(m: int, n: int, available: int, *, seed: int) -> LayerSpectrum:
    generator = torch.Generator().manual_seed(seed)
    sigma = torch.rand(available, generator=generator, dtype=torch.float64).sort(descending=True).values
    return LayerSpectrum(f"layer{seed}", 3 * sigma**3, (m, n))


def context_of(spectra: list[LayerSpectrum], *, step: int = 10, other: int = 50) -> PlanContext:
    return PlanContext(step, sum(m * n for m, n in (s.shape for s in spectra)) + other, other)


SPECTRA: dict[str, Callable[[], list[LayerSpectrum]]] = {
    "some ranks": lambda: [falling(m, n, max(1, min(m, n) // 2), seed=i) for i, (m, n) in enumerate(SHAPES)],
    "full ranks": lambda: [falling(m, n, min(m, n), seed=i) for i, (m, n) in enumerate(SHAPES)],
    "rank 1": lambda: [falling(m, n, 1, seed=i) for i, (m, n) in enumerate(SHAPES)],
    "one layer": lambda: [falling(30, 20, 12, seed=1)],
    "zero": lambda: [LayerSpectrum("zero", torch.zeros(6).double(), (30, 20)), falling(20, 30, 9, seed=1)],
    "flat": lambda: [LayerSpectrum("flat", torch.ones(6).double(), (30, 20))],
    "tiny": lambda: [LayerSpectrum("tiny", 1e-200 * torch.ones(6).double(), (30, 20))],
}


@pytest.fixture(params=sorted(POLICIES))
def name(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture(params=sorted(SPECTRA))
def spectra(request: pytest.FixtureRequest) -> list[LayerSpectrum]:
    return SPECTRA[request.param]()


def test_every_layer_gets_a_possible_rank_and_a_reason(name, spectra):
    plan = build(name).plan(spectra, context_of(spectra))
    assert len(plan) == len(spectra)
    for decision, spectrum in zip(plan, spectra, strict=True):
        assert isinstance(decision, Decision) and isinstance(decision.rank, int)
        assert 1 <= decision.rank <= len(spectrum.sigma)
        assert 0 <= decision.candidates <= spectrum.max_rank - decision.rank
        assert decision.reason.strip() and len(decision.reason) < 80


def test_a_plan_is_a_pure_function(name, spectra):
    kept, before = [s.sigma.clone() for s in spectra], torch.get_rng_state()
    policy, context = build(name), context_of(spectra)
    assert policy.plan(spectra, context) == policy.plan(spectra, context) == build(name).plan(spectra, context)
    assert all(torch.equal(s.sigma, sigma) for s, sigma in zip(spectra, kept, strict=True))
    assert torch.equal(before, torch.get_rng_state())


def test_the_order_of_the_layers_does_not_matter(name, spectra):
    policy, context = build(name), context_of(spectra)
    assert policy.plan(spectra[::-1], context)[::-1] == policy.plan(spectra, context)


@pytest.mark.parametrize("single", sorted(POLICIES.keys() - SHARED))
def test_a_layer_decides_alone_unless_the_policy_shares(single, spectra):
    policy, context = build(single), context_of(spectra)
    alone = [policy.plan([spectrum], context)[0] for spectrum in spectra]
    assert alone == policy.plan(spectra, context)


def test_a_plan_of_no_layer_is_empty(name):
    assert build(name).plan([], PlanContext(0, 100, 10)) == []


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: RelativeTail(0.0), "RelativeTail: tolerance must be between 0 and 1, got 0.0"),
        (lambda: RelativeTail(1.5), "RelativeTail: tolerance must be between 0 and 1, got 1.5"),
        (lambda: RelativeTail(float("nan")), "RelativeTail: tolerance must be between 0 and 1, got nan"),
        (lambda: AbsoluteTail(0.0), "AbsoluteTail: tolerance must be above 0, got 0.0"),
        (lambda: AbsoluteTail(-1.0), "AbsoluteTail: tolerance must be above 0, got -1.0"),
        (lambda: RetainedEnergy(1.0), "RetainedEnergy: energy must be between 0 and 1, got 1.0"),
        (lambda: NoiseEdge(factor=0.0), "NoiseEdge: factor must be above 0, got 0.0"),
        (lambda: NoiseEdge(settle=0), "NoiseEdge: settle must be at least 1, got 0"),
        (lambda: EstimatedNoiseEdge(margin=0.5), "EstimatedNoiseEdge: margin must be at least 1, got 0.5"),
        (lambda: EstimatedNoiseEdge(probes=-1), "EstimatedNoiseEdge: probes must be at least 0, got -1"),
        (lambda: EstimatedNoiseEdge(factor=0.0), "EstimatedNoiseEdge: factor must be above 0, got 0.0"),
        (lambda: EstimatedNoiseEdge(settle=0), "EstimatedNoiseEdge: settle must be at least 1, got 0"),
        (lambda: Fixed(0), "Fixed: rank must be at least 1, got 0"),
        (lambda: Fraction(0.0), "Fraction: part must be between 0 and 1, got 0.0"),
        (lambda: SigmaCutoff(1.0), "SigmaCutoff: beta must be between 0 and 1, got 1.0"),
        (lambda: SigmaCutoff(largest_cut=0.0), "SigmaCutoff: largest_cut must be above 0 and at most 1, got 0.0"),
        (lambda: SignalEnergy(explained=1.0), "SignalEnergy: explained must be between 0 and 1, got 1.0"),
        (lambda: VarianceRatio(0.0), "VarianceRatio: explained must be between 0 and 1, got 0.0"),
        (lambda: VarianceRatio(buffer=0), "VarianceRatio: buffer must be at least 1, got 0"),
        (lambda: Budget(0.0), "Budget: fraction must be between 0 and 1, got 0.0"),
        (lambda: Budget(1.2), "Budget: fraction must be between 0 and 1, got 1.2"),
        (lambda: Budget(0.2, start=0.1, steps=9), "Budget: start must be between fraction = 0.2 and 1, got 0.1"),
        (lambda: Budget(0.2, start=0.5), "Budget: steps must be at least 1 with start .* got steps = 0"),
        (lambda: Budget(0.2, steps=5), "Budget: steps must be at least 1 with start and 0 without, got steps = 5"),
        (lambda: Budget(0.2, start=0.5, steps=-5), "Budget: steps must be at least 1 .* got steps = -5"),
    ],
)
def test_arguments_out_of_range_are_named(make: Callable[[], object], message: str):
    with pytest.raises(ValueError, match=message):
        make()


def test_common_arguments_out_of_range_are_named(name):
    fields = {f.name for f in dataclasses.fields(POLICIES[name])}
    outside = (("growth", -0.5, "at least 0"), ("growth", float("inf"), "finite"), ("min_rank", 0, "at least 1"))
    for field, bad, allowed in outside:
        if field in fields:
            message = rf"{POLICIES[name].__name__}: {field} must be .*{allowed}.*, got {bad}"
            with pytest.raises(ValueError, match=message):
                dataclasses.replace(build(name), **{field: bad})


@pytest.mark.parametrize(
    ("rank", "largest", "growth", "count"),
    [(4, 99, 0.0, 0), (4, 99, 0.01, 1), (4, 99, 0.5, 2), (4, 99, 2.0, 8), (4, 6, 2.0, 2), (4, 4, 1.0, 0)],
)
def test_candidates_are_a_fraction_at_least_one_and_fit(rank: int, largest: int, growth: float, count: int):
    assert candidates(rank, largest, growth) == count
