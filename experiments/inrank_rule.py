"""InRank's rule as published and corrected: ranks of layers that have learnt nothing, and of planted ones under noise.

    python experiments/inrank_rule.py

Untrained layers start as InRank starts them: two factors drawn as ``nn.Linear`` draws its weight, of which the first
``2 + buffer`` directions are in use, and a rule that is asked again and again while nothing is trained. The buffer is
100, or a quarter of full rank where that is less. ``sigma_cutoff``, which only cuts, starts from a fresh ``nn.Linear``
of full rank. Right is a rank of 2 or less. Some rules know the step: they expect that training has pulled the random
start down by step 1000, and an untrained layer that is shown to them then is a harder question than it is at step 0.

Planted weights are the least-squares solution of a linear regression with unit signal variance, 64 samples an input
feature and noise on the targets: equal singular values under noise, or noise alone. Between two questions the layer is
the best approximation of the rank that it has, so this is training without its troubles. Right is the planted rank, and
1 where nothing is planted.
"""

from collections.abc import Callable
from functools import cache
from pathlib import Path

import torch
from torch import Tensor, nn

from dynarank.data.synthetic import planted_weight
from dynarank.ranks.base import AbstractRankPolicy, LayerSpectrum, PlanContext
from dynarank.ranks.sigma_cutoff import SigmaCutoff
from dynarank.ranks.signal_energy import SignalEnergy
from dynarank.ranks.variance_ratio import VarianceRatio

RESULTS = Path(__file__).parent / "results"
SHAPES = ((128, 128), (384, 128), (512, 128), (768, 768), (64, 576), (3072, 768), (4096, 1024), (5120, 1280))
BETAS = (0.1, 0.15, 0.3)
SEEDS, EVENTS = range(3), 30
START = 2  # InRank's first rank
SpectrumOf = Callable[[int], Tensor]  # the singular values by the number of directions in use


def buffer_of(shape: tuple[int, int]) -> int:
    """Return how many directions are tried on top of the first rank."""
    return min(100, min(shape) // 4)


def untrained(shape: tuple[int, int], seed: int) -> SpectrumOf:
    """Return the spectra of ``A[:, :k] B[:k]`` by ``k``, with random ``A (m, full)`` and ``B (full, n)``.

    Both are uniform with ``nn.Linear``'s bound for their inputs, of which ``A`` has half of full rank, as in InRank.
    """
    (m, n), full = shape, min(shape)
    generator = torch.Generator().manual_seed(seed)
    A, B = (2 * torch.rand(size, full, generator=generator, dtype=torch.float64) - 1 for size in (m, n))
    (_, left), (_, right) = torch.linalg.qr(A / (full / 2) ** 0.5), torch.linalg.qr(B / n**0.5)

    @cache
    def spectrum(seen: int) -> Tensor:
        return torch.linalg.svdvals(left[:seen, :seen] @ right[:seen, :seen].T)

    return spectrum


def settled_rank(
    policy: AbstractRankPolicy, spectrum_of: SpectrumOf, shape: tuple[int, int], *, step: int = 1000
) -> int:
    """Return the rank at which a policy stops, asked about the spectra of the numbers of directions it chose."""
    rank, seen, ranks = START, START + buffer_of(shape), []
    for _ in range(EVENTS):
        layer = LayerSpectrum("layer", spectrum_of(seen), shape, kept=rank)
        decision = policy.plan([layer], PlanContext(step, 0, 0))[0]
        rank, seen = decision.rank, decision.rank + decision.candidates
        ranks.append((rank, seen))
    assert ranks[-1] == ranks[-2], "the rank has not settled"
    return rank


def cut(sigma: Tensor, shape: tuple[int, int], beta: float) -> int:
    """Return the rank that OIALR's rule leaves of a layer with full rank, after as many events as it takes."""
    rank = len(sigma)
    for _ in range(EVENTS):
        layer = LayerSpectrum("layer", sigma[:rank], shape, kept=rank)
        rank = SigmaCutoff(beta).plan([layer], PlanContext(0, 0, 0))[0].rank
    return rank


def fresh(shape: tuple[int, int], seed: int) -> Tensor:
    """Return the singular values of a fresh ``nn.Linear``."""
    torch.manual_seed(seed)
    return torch.linalg.svdvals(nn.Linear(shape[1], shape[0], bias=False).weight.detach().double())


def untrained_row(shape: tuple[int, int]) -> str:
    """Return the ranks of untrained layers of one shape."""
    (m, n), buffer = shape, buffer_of(shape)
    found: list[list[int]] = [[], [], []]
    for seed in SEEDS:
        spectrum_of = untrained(shape, seed)
        found[0].append(settled_rank(VarianceRatio(buffer=buffer), spectrum_of, shape))
        for ranks, step in zip(found[1:], (0, 1000), strict=True):
            ranks.append(settled_rank(SignalEnergy(), spectrum_of, shape, step=step))
    sigma = [fresh(shape, seed) for seed in SEEDS]
    cuts = [", ".join(str(cut(each, shape, beta)) for each in sigma) for beta in BETAS]
    cells = [f"{m}x{n}", str(buffer), *(", ".join(map(str, ranks)) for ranks in found), *cuts]
    return f"| {' | '.join(cells)} |"


def noisy(planted: int, noise: float, shape: tuple[int, int], seed: int) -> Tensor:
    """Return what least squares finds: a weight of planted rank, and noise on it."""
    (m, n), generator = shape, torch.Generator().manual_seed(seed)
    W = planted_weight(planted, inputs=n, outputs=m, generator=generator)
    return W + noise / (64 * n) ** 0.5 * torch.randn(m, n, generator=generator, dtype=torch.float64)


def planted_row(shape: tuple[int, int], planted: int, noise: float) -> str:
    """Return the ranks found in noisy weights of one planted rank."""
    (m, n), buffer = shape, buffer_of(shape)
    found: list[list[int]] = [[], [], []]
    for seed in SEEDS:
        sigma = torch.linalg.svdvals(noisy(planted, noise, shape, seed))
        found[0].append(settled_rank(VarianceRatio(buffer=buffer), lambda seen, sigma=sigma: sigma[:seen], shape))
        found[1].append(settled_rank(SignalEnergy(), lambda seen, sigma=sigma: sigma[:seen], shape))
        found[2].append(cut(sigma, shape, 0.15))
    cells = [f"{m}x{n}", str(planted), f"{noise:g}", *(", ".join(map(str, ranks)) for ranks in found)]
    return f"| {' | '.join(cells)} |"


def main() -> None:
    """Ask every rule and write the tables."""
    torch.set_num_threads(1)
    betas = " | ".join(f"sigma_cutoff, beta {beta:g}" for beta in BETAS)
    lines = [
        "| untrained layer | buffer | variance_ratio (published) | signal_energy (corrected) | the same at step 1000 | "
        f"{betas} |",
        "|---|---|---|---|---|" + "---|" * len(BETAS),
        *(untrained_row(shape) for shape in SHAPES),
        "",
        "| layer | planted | noise | variance_ratio | signal_energy | sigma_cutoff, beta 0.15 |",
        "|---|---|---|---|---|---|",
        *(
            planted_row(shape, planted, noise)
            for shape in ((48, 64), (512, 128))
            for planted in (0, 3, 8, 20)
            for noise in (0.1, 0.5, 1.0)
        ),
    ]
    text = "\n".join(lines)
    print(text)
    head = f"# InRank's rule and pure noise\n\n`python experiments/inrank_rule.py`, seeds 0-{SEEDS.stop - 1} a cell\n\n"
    tail = (__doc__ or "").split("\n\n", 2)[2].strip()
    (RESULTS / "inrank_rule.md").write_text(f"{head}{text}\n\n{tail}\n")


if __name__ == "__main__":
    main()
