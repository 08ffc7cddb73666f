"""Pufferfish: full rank for a fixed time, then two factors of a fixed part of the rank."""

from typing import Any

from torch import nn
from torch.optim import Optimizer

from dynarank.dense_start.dense_start import DenseStart
from dynarank.ranks.base import AbstractRankPolicy
from dynarank.ranks.fraction import Fraction
from dynarank.switches.at_step import AtStep


def pufferfish(
    model: nn.Module,
    optimizer: Optimizer,
    *,
    delay: int,
    part: float = 0.25,
    rank_policy: AbstractRankPolicy | None = None,
    **options: Any,
) -> DenseStart:
    """Train with full rank for ``delay`` steps, then ``U sqrt(S)`` and ``sqrt(S) V^T`` at a fixed part of the rank.

    Args:
        model: A dense model.
        optimizer: Any torch optimizer that holds its parameters.
        delay: Optimizer steps with full rank.
        part: Rank of every layer as a part of the full one.
        rank_policy: Instead of ``part``: which ranks layers keep.
        options: Further options of `DenseStart`, such as ``exclude_modules`` for the first layers.

    Reference:
        Wang, Agarwal, Papailiopoulos, "Pufferfish: communication-efficient models at no extra cost", MLSys 2021,
        https://arxiv.org/abs/2103.03936.

    Example:
        >>> import torch
        >>> model = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 10))
        >>> start = pufferfish(model, torch.optim.SGD(model.parameters(), lr=0.1), delay=100)
    """
    policy = rank_policy or Fraction(part)
    return DenseStart(model, optimizer, switch=AtStep(delay), rank_policy=policy, trained="factors", **options)
