"""Cuttlefish: full rank until the stable ranks have settled, then two factors of the scaled stable ranks."""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any, final

from torch import Tensor, nn
from torch.optim import Optimizer

from dynarank.dense_start._speedups import Speedup, measured_speedup, slow_layers
from dynarank.dense_start.dense_start import DenseStart
from dynarank.measure import Forward, call
from dynarank.ranks.base import AbstractRankPolicy
from dynarank.ranks.scaled_stable_rank import ScaledStableRank
from dynarank.switches.base import AbstractSwitch, State
from dynarank.switches.settled_stable_rank import SettledStableRank


def cuttlefish(
    model: nn.Module,
    optimizer: Optimizer,
    *,
    every: int,
    latest: int | None = None,
    rank_policy: AbstractRankPolicy | None = None,
    least_speedup: float | None = None,
    batch: Any = None,
    forward: Forward = call,
    speedup: Speedup = measured_speedup,
    **options: Any,
) -> DenseStart:
    """Train with full rank until stable ranks have settled, then two factors of scaled stable rank; nothing to tune.

    With ``least_speedup`` layers that would gain too little time stay dense: before the run each is timed, forward and
    backward, dense and as two factors of a quarter of full rank, on what it sees of a batch. ``start.left_dense`` says
    which they are and why. Times differ from run to run: a run that may be interrupted names the layers that were
    found in ``exclude_modules`` instead, so that it goes on with the same.

    Args:
        model: A dense model.
        optimizer: Any torch optimizer that holds its parameters.
        every: Optimizer steps between looks at the stable ranks; an epoch as published.
        latest: Optimizer steps after which layers go low-rank even if stable ranks have not settled. None: never.
        rank_policy: Instead of scaled stable ranks: which ranks layers keep.
        least_speedup: Layers that two factors make less than so many times as fast stay dense. None: nothing is timed.
        batch: What ``forward`` takes, a batch as in training, to time layers on.
        forward: How a batch enters the model.
        speedup: How many times as fast a low-rank layer is as a dense one on a list of inputs; by default measured.
        options: Further options of `DenseStart`, such as ``exclude_modules``.

    Raises:
        TypeError: One of ``least_speedup`` and ``batch`` is missing.
        ValueError: No layer would gain as much, or ``least_speedup`` is not above 0.

    Reference:
        Wang, Agarwal, U-chupala, Tanaka, Xing, Papailiopoulos, "Cuttlefish: low-rank model training without all the
        tuning", MLSys 2023, https://arxiv.org/abs/2305.02538. There stacks of layers are timed at several ranks, and
        all layers before the first stack that gains stay dense; here each layer is judged by itself.

    Example:
        >>> import torch
        >>> model = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 48), nn.ReLU(), nn.Linear(48, 10))
        >>> start = cuttlefish(
        ...     model,
        ...     torch.optim.SGD(model.parameters(), lr=0.1),
        ...     every=50,
        ...     least_speedup=1.5,
        ...     batch=torch.zeros(32, 64),
        ...     speedup=lambda dense, low_rank, inputs: dense.out_features / 40,
        ... )
        >>> list(start.candidates), start.left_dense["2"]
        (['0'], '1.20 times as fast at rank 12, below least_speedup = 1.5')
    """
    if (least_speedup is None) != (batch is None):
        missing = "batch" if batch is None else "least_speedup"
        raise TypeError(
            f"cuttlefish times layers on a batch: least_speedup and batch go together, {missing} is missing."
        )
    if least_speedup is not None:
        if not least_speedup > 0:
            raise ValueError(f"cuttlefish: least_speedup must be above 0, got {least_speedup}.")
        options["stay_dense"] = partial(
            slow_layers, model, least=least_speedup, batch=batch, forward=forward, speedup=speedup
        )
    settled: AbstractSwitch = SettledStableRank(every=every)
    return DenseStart(
        model,
        optimizer,
        switch=settled if latest is None else AtLatest(settled, latest),
        rank_policy=rank_policy or ScaledStableRank(growth=0),
        trained="factors",
        **options,
    )


@final
@dataclass(frozen=True)
class AtLatest(AbstractSwitch):
    """Another switch up to a step, at which all layers are ready.

    Args:
        switch: The other.
        step: The step.
    """

    switch: AbstractSwitch
    step: int

    def __post_init__(self) -> None:
        if self.step < 1:
            raise ValueError(f"latest must be at least 1, got {self.step}.")

    def looks(self, step: int) -> bool:
        return step >= self.step or self.switch.looks(step)

    def init(self) -> State:
        return self.switch.init()

    def look(self, step: int, weights: Mapping[str, Tensor], state: State) -> tuple[frozenset[str], State]:
        if step >= self.step:
            return frozenset(weights), state
        return self.switch.look(step, weights, state)
