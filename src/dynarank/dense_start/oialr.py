"""OIALR: full rank first, then frozen orthogonal bases with a trained core whose rank falls."""

from typing import Any

from torch import nn
from torch.optim import Optimizer

from dynarank.dense_start.dense_start import DenseStart
from dynarank.ranks.base import AbstractRankPolicy
from dynarank.ranks.sigma_cutoff import SigmaCutoff
from dynarank.switches.at_step import AtStep
from dynarank.switches.base import AbstractSwitch


def oialr(
    model: nn.Module,
    optimizer: Optimizer,
    *,
    delay: int | None = None,
    every: int = 500,
    beta: float = 0.15,
    switch: AbstractSwitch | None = None,
    rank_policy: AbstractRankPolicy | None = None,
    window: float | None = 0.1,
    largest_cut: float | None = 0.5,
    **options: Any,
) -> DenseStart:
    """Train with full rank for ``delay`` steps, then only the cores between bases that stay, and cut their ranks.

    As published, but for what the authors' code gets wrong: optimizer steps count and not forward passes, biases keep
    training, the optimizer's state of a core starts afresh, the window of layers really grows, a layer stays dense
    until a cut makes it smaller (``keep_dense=False``: it becomes ``U S V^T`` at once), and with a
    `LowRankOptimizer` the bases move on.

    Args:
        model: A dense model.
        optimizer: Any torch optimizer that holds its parameters.
        delay: Optimizer steps with full rank. Needed unless a switch is given.
        every: Optimizer steps between refreshes.
        beta: Singular values below this part of the largest are cut.
        switch: Instead of ``delay``: when layers are ready.
        rank_policy: Instead of ``beta``: which ranks they keep.
        window: Part of the layers by which the window grows at each refresh, the last first.
        largest_cut: Largest part of its rank that a layer loses at a refresh.
        options: Further options of `DenseStart`.

    Raises:
        TypeError: Neither ``delay`` nor ``switch`` is given, or both.

    Reference:
        Coquelin, Flügel, Weiel, Kiefer, Debus, Streit, Götz, "Harnessing orthogonality to train low-rank neural
        networks", 2024, https://arxiv.org/abs/2401.08505.

    Example:
        >>> import torch
        >>> model = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 10))
        >>> optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        >>> start = oialr(model, optimizer, delay=100, every=50)
        >>> list(start.dense)
        ['0']
    """
    if (delay is None) == (switch is None):
        raise TypeError(f"oialr takes delay or switch, got {'neither' if delay is None else 'both'}.")
    return DenseStart(
        model,
        optimizer,
        switch=switch or AtStep(delay or 0),
        rank_policy=rank_policy or SigmaCutoff(beta, largest_cut=1.0),
        every=every,
        window=window,
        largest_cut=largest_cut,
        **options,
    )
