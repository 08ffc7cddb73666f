"""The rule of each policy in which layers decide alone, against the spectrum itself."""

from itertools import pairwise

import pytest
import torch
from torch import Tensor, nn

from dynarank.ranks.absolute_tail import AbsoluteTail
from dynarank.ranks.base import AbstractRankPolicy, Decision, LayerSpectrum, PlanContext
from dynarank.ranks.fixed import Fixed
from dynarank.ranks.fraction import Fraction
from dynarank.ranks.noise_edge import NoiseEdge
from dynarank.ranks.relative_tail import RelativeTail
from dynarank.ranks.retained_energy import RetainedEnergy
from dynarank.ranks.sigma_cutoff import SigmaCutoff

SPECTRA = [[4.0, 2.0, 1.0, 0.5, 0.01], [3.0], [1.0, 1.0, 1.0, 1.0], [1e3, 1e-3, 1e-9], [0.0, 0.0]]


def decide(
    policy: AbstractRankPolicy, sigma: list[float] | Tensor, shape: tuple[int, int] = (40, 30), *, step: int = 0
) -> Decision:
    spectrum = LayerSpectrum("layer", torch.as_tensor(sigma, dtype=torch.float64), shape)
    return policy.plan([spectrum], PlanContext(step, 9999, 99))[0]


def error(sigma: list[float], rank: int) -> float:
    return sum(value**2 for value in sigma[rank:]) ** 0.5


def smallest(sigma: list[float], allowed: float) -> int:
    return min([rank for rank in range(1, len(sigma)) if error(sigma, rank) <= allowed], default=len(sigma))


@pytest.mark.parametrize("sigma", SPECTRA)
@pytest.mark.parametrize("tolerance", [1e-9, 0.03, 0.1, 0.3, 0.9])
def test_relative_tail_is_the_smallest_rank_within_the_share_of_the_norm(sigma: list[float], tolerance: float):
    decision = decide(RelativeTail(tolerance), sigma)
    assert decision.rank == smallest(sigma, tolerance * error(sigma, 0))
    assert f"{tolerance:g}" in decision.reason


@pytest.mark.parametrize("tolerance", [0.03, 0.3])
def test_relative_tail_does_not_see_the_scale(tolerance: float):
    sigma = torch.tensor(SPECTRA[0], dtype=torch.float64)
    assert decide(RelativeTail(tolerance), sigma) == decide(RelativeTail(tolerance), 1e6 * sigma)


@pytest.mark.parametrize("sigma", SPECTRA)
@pytest.mark.parametrize("tolerance", [1e-6, 0.03, 0.6, 1.3, 99.0])
def test_absolute_tail_is_the_smallest_rank_within_the_error(sigma: list[float], tolerance: float):
    decision = decide(AbsoluteTail(tolerance), sigma)
    assert decision.rank == smallest(sigma, tolerance)
    assert f"{tolerance:g}" in decision.reason


@pytest.mark.parametrize("sigma", SPECTRA)
@pytest.mark.parametrize("energy", [0.05, 0.5, 0.9, 0.999])
def test_retained_energy_is_the_smallest_rank_with_the_share(sigma: list[float], energy: float):
    rank, total = decide(RetainedEnergy(energy), sigma).rank, error(sigma, 0) ** 2
    kept = [total - error(sigma, r) ** 2 for r in range(len(sigma) + 1)]
    assert kept[rank] >= energy * total * (1 - 1e-12)
    assert rank == 1 or kept[rank - 1] < energy * total * (1 + 1e-12)
    assert rank == decide(RelativeTail((1 - energy) ** 0.5), sigma).rank


@pytest.mark.parametrize("make", [RelativeTail, AbsoluteTail, RetainedEnergy, NoiseEdge, SigmaCutoff])
def test_growth_and_min_rank_are_obeyed(make: type):
    policy = make(growth=0.5, min_rank=3)
    assert decide(policy, [1e3, 1e-6, 1e-7, 1e-8]).rank == 3
    assert decide(policy, [1e3, 1e-6]).rank == 2, "min_rank cannot exceed what there is"
    assert decide(policy, [1e3, 1e-6, 1e-7, 1e-8]).candidates == 2
    assert decide(policy, [1e3, 1e-6, 1e-7, 1e-8], (4, 9)).candidates == 1, "no more than fit"
    assert decide(make(growth=0.0), [1e3, 1e-6]).candidates == 0


def test_fixed_keeps_or_cuts_and_never_grows():
    for sigma in SPECTRA:
        assert decide(Fixed(), sigma) == Decision(len(sigma), 0, "fixed")
        assert decide(Fixed(2), sigma) == Decision(min(2, len(sigma)), 0, "fixed")


@pytest.mark.parametrize("part", [0.01, 0.25, 0.29, 0.5, 0.99])
@pytest.mark.parametrize("shape", [(100, 130), (7, 5), (3, 50), (1, 9)])
def test_a_fraction_is_the_same_part_of_every_layer_and_never_grows(part: float, shape: tuple[int, int]):
    full = min(shape)
    wanted = max(1, int(round(part * full, 6)))
    assert decide(Fraction(part), torch.ones(full), shape) == Decision(wanted, 0, f"{part:g} of full rank")
    assert decide(Fraction(part), torch.ones(1), shape).rank == 1
    assert decide(Fraction(part, min_rank=4), torch.ones(full), shape).rank == min(full, max(4, wanted))


# --- the noise edge ----------------------------------------------------------------------------------------------

FRESH = {
    **{f"linear {m}x{n}": (lambda m=m, n=n: nn.Linear(n, m)) for m, n in ((7, 5), (5, 7), (64, 64), (256, 48))},
    **{f"linear {m}x{n}": (lambda m=m, n=n: nn.Linear(n, m)) for m, n in ((48, 256), (10, 784), (300, 300))},
    "conv 3-64-3": lambda: nn.Conv2d(3, 64, 3),
    "conv 6-16-5": lambda: nn.Conv2d(6, 16, 5),
    "conv 64-64-3": lambda: nn.Conv2d(64, 64, 3),
    "conv 16-32-1": lambda: nn.Conv2d(16, 32, 1),
}


def fresh_weight(name: str) -> Tensor:
    return FRESH[name]().weight.detach().double().flatten(1)


@pytest.mark.parametrize("name", FRESH)
@pytest.mark.parametrize("seed", range(5))
def test_an_untrained_layer_is_noise(name: str, seed: int):
    torch.manual_seed(seed)
    W = fresh_weight(name)
    fluctuation = 1 if min(W.shape) > 40 else 2
    assert decide(NoiseEdge(), torch.linalg.svdvals(W), tuple(W.shape)).rank <= fluctuation


@pytest.mark.parametrize("planted", [3, 8])
@pytest.mark.parametrize(("noise", "step"), [(0.1, 0), (0.5, 0), (1.0, 0), (0.1, 10_000), (0.3, 10_000)])
@pytest.mark.parametrize("name", ["linear 64x64", "linear 256x48", "linear 48x256", "conv 64-64-3"])
def test_planted_ranks_are_found_at_several_noise_levels(name: str, noise: float, step: int, planted: int):
    W = noise * fresh_weight(name)
    U, V = (torch.linalg.qr(torch.randn(size, planted, dtype=torch.float64))[0] for size in W.shape)
    strength = 2 * torch.linalg.matrix_norm(fresh_weight(name), 2)
    W = W + strength * U @ torch.diag(torch.linspace(2, 1, planted).double()) @ V.mT
    assert decide(NoiseEdge(), torch.linalg.svdvals(W), tuple(W.shape), step=step).rank == planted


@pytest.mark.parametrize("shape", [(64, 48), (48, 256)])
@pytest.mark.parametrize("factor", [0.2, 0.4, 1.0])
def test_the_threshold_falls_from_the_edge_to_its_share_while_training_settles(shape: tuple[int, int], factor: float):
    policy, (m, n) = NoiseEdge(factor=factor, settle=50), shape
    edge = (m**0.5 + n**0.5) * (1 / 3 / n) ** 0.5  # of entries with variance 1 / (3 n)
    thresholds = [policy.threshold(shape, step) for step in range(80)]
    assert thresholds[0] == pytest.approx(edge) and thresholds[50:] == pytest.approx([factor * edge] * 30)
    assert all(later <= earlier for earlier, later in pairwise(thresholds))
