"""Linear regression with a planted rank: the case where the right answer is known."""

from dataclasses import dataclass
from typing import final

import torch

from dynarank.data.splits import DataSplits

FRAME_SWEEPS = 100  # alternating projections; convergence is slow only where rank = outputs - 1 (2 % spread is left)


@final
@dataclass(frozen=True, eq=False)
class PlantedTeacher:
    """A regression problem together with the weight that made its targets.

    Args:
        splits: Inputs and noisy targets.
        weight: The planted weight W*, in torch's ``(outputs, inputs)`` layout.
    """

    splits: DataSplits
    weight: torch.Tensor  # (outputs, inputs)


def planted_teacher(
    rank: int,
    *,
    inputs: int = 64,
    outputs: int = 48,
    samples: int = 4096,
    noise: float = 0.1,
    seed: int = 0,
) -> PlantedTeacher:
    """Draw ``y = W* x + noise`` with standard normal x and a weight W* of exact rank ``rank``.

    Every output has signal variance 1, and the singular values of W* are (nearly) equal, so that a rank found below or
    above ``rank`` is plainly wrong. With ``rank=0`` the targets are noise only: nothing is there to be found.

    Args:
        rank: Rank of W*; 0 for pure noise.
        inputs: Input features n.
        outputs: Output features m.
        samples: Training samples. Validation and test have a quarter as many each, rounded up.
        noise: Standard deviation of the label noise; the signal has 1.
        seed: Seed of everything drawn here. The global generator is neither used nor changed.

    Shape:
        - inputs: ``(samples, inputs)``; targets: ``(samples, outputs)``, float32.
        - weight: ``(outputs, inputs)``, float32.

    Raises:
        ValueError: If ``rank`` is not between 0 and min(inputs, outputs), if a size is below 1, or ``noise`` below 0.

    Example:
        >>> teacher = planted_teacher(3, inputs=7, outputs=5, samples=100)
        >>> torch.linalg.matrix_rank(teacher.weight, rtol=1e-5)
        tensor(3)
        >>> teacher.splits
        DataSplits(synthetic: train (100, 7), validation (25, 7), test (25, 7), classes None)
    """
    if min(inputs, outputs, samples) < 1:
        got = f"{inputs}, {outputs} and {samples}"
        raise ValueError(f"planted_teacher: inputs, outputs and samples must be at least 1, got {got}.")
    if not 0 <= rank <= min(inputs, outputs):
        allowed = f"between 0 and min(inputs, outputs) = {min(inputs, outputs)}"
        raise ValueError(f"planted_teacher: rank must be {allowed}, got {rank}.")
    if noise < 0:
        raise ValueError(f"planted_teacher: noise is a standard deviation and must be at least 0, got {noise}.")
    generator = torch.Generator().manual_seed(seed)
    weight = planted_weight(rank, inputs=inputs, outputs=outputs, generator=generator).float()
    held_out = -(-samples // 4)
    train, validation, test = (_draw(weight, n, noise, generator) for n in (samples, held_out, held_out))
    return PlantedTeacher(DataSplits("synthetic", *train, *validation, *test, classes=None), weight)


def planted_weight(rank: int, *, inputs: int, outputs: int, generator: torch.Generator) -> torch.Tensor:
    """Draw a weight ``W = F Vᵀ`` of exact rank r with rows of unit norm and singular values close to √(m / r).

    V has orthonormal columns; F is a unit-norm tight frame found by alternating projections: orthogonal columns of
    equal norm, then rows of norm 1. The rows are exact, the singular values agree within 2 %.

    Args:
        rank: Rank r, between 0 and min(inputs, outputs).
        inputs: Columns n of W.
        outputs: Rows m of W.
        generator: Source of the directions, on the CPU.

    Shape:
        ``(outputs, inputs)``, float64; zero for rank 0.

    Example:
        >>> W = planted_weight(2, inputs=5, outputs=8, generator=torch.Generator().manual_seed(0))
        >>> torch.linalg.svdvals(W).round(decimals=2)
        tensor([2., 2., 0., 0., 0.], dtype=torch.float64)

    Reference:
        J. A. Tropp, I. S. Dhillon, R. W. Heath, T. Strohmer, Designing structured tight frames via an alternating
        projection method, IEEE Transactions on Information Theory 51(1), 2005,
        https://doi.org/10.1109/TIT.2004.839492. A fixed number of sweeps, without a convergence test.
    """
    if rank == 0:
        return torch.zeros(outputs, inputs, dtype=torch.float64)
    F = torch.randn(outputs, rank, dtype=torch.float64, generator=generator)  # (m, r)
    V = torch.linalg.qr(torch.randn(inputs, rank, dtype=torch.float64, generator=generator)).Q  # (n, r)
    for _ in range(FRAME_SWEEPS):
        P, _, Qh = torch.linalg.svd(F, full_matrices=False)
        F = torch.nn.functional.normalize(P @ Qh, dim=1, eps=0.0)
    return F @ V.T  # (m, n)


def _draw(
    weight: torch.Tensor, samples: int, noise: float, generator: torch.Generator
) -> tuple[torch.Tensor, torch.Tensor]:
    outputs, inputs = weight.shape
    x = torch.randn(samples, inputs, generator=generator)  # (samples, n)
    return x, x @ weight.T + noise * torch.randn(samples, outputs, generator=generator)  # (samples, m)
