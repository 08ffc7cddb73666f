"""Cuttlefish: full rank until the stable ranks have settled, then two factors of the scaled stable ranks."""

from typing import Any

from torch import nn
from torch.optim import Optimizer

from dynarank.dense_start.dense_start import DenseStart
from dynarank.ranks.scaled_stable_rank import ScaledStableRank
from dynarank.switches.settled_stable_rank import SettledStableRank


def cuttlefish(model: nn.Module, optimizer: Optimizer, *, every: int, **options: Any) -> DenseStart:
    """Train with full rank until stable ranks have settled, then two factors of scaled stable rank; nothing to tune.

    Args:
        model: A dense model.
        optimizer: Any torch optimizer that holds its parameters.
        every: Optimizer steps between looks at the stable ranks; an epoch as published.
        options: Further options of `DenseStart`, such as ``exclude_modules`` for layers that would gain no time.

    Reference:
        Wang, Agarwal, U-chupala, Tanaka, Xing, Papailiopoulos, "Cuttlefish: low-rank model training without all the
        tuning", MLSys 2023, https://arxiv.org/abs/2305.02538.

    Example:
        >>> import torch
        >>> model = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 10))
        >>> start = cuttlefish(model, torch.optim.SGD(model.parameters(), lr=0.1), every=50)
    """
    settled = SettledStableRank(every=every)
    return DenseStart(
        model, optimizer, switch=settled, rank_policy=ScaledStableRank(growth=0), trained="factors", **options
    )
