"""What contestants cost at their final ranks: operations, memory of a training step, and time beside dense."""

import copy
from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import partial
from statistics import median, quantiles
from time import perf_counter
from typing import Any

import torch
from torch import nn

from dynarank.experiments.contest.methods import find_method
from dynarank.experiments.contest.run import Run, train_step
from dynarank.experiments.contestants.base import AbstractContestant, Setting
from dynarank.experiments.contestants.dense import Dense
from dynarank.experiments.subject import batch_size
from dynarank.experiments.tasks.base import AbstractTask
from dynarank.factorize import to_plain_
from dynarank.layers._factored import factored_layers
from dynarank.measure import flops, interleaved, peak_memory

DENSE, AGAIN = "dense", "dense again"  # two networks, trained by the task's own recipe
LEAST_ROUNDS = 7
STILL = 1e-3  # the part of the learning rate that is used: what counts is the time of a step, not where it goes
NO_EVENT = 10**9  # steps of a training in which no rank event comes for as long as is measured


def measure_costs(task: AbstractTask, runs: Mapping[str, tuple[Run, Mapping[str, int]]], *, seconds: float) -> Any:
    """Return what a training step of each contestant costs; times of all of them are taken in turn.

    Args:
        task: Data and loss.
        runs: By name, a run and the ranks that it ended with.
        seconds: About how long to measure the time of each.

    Returns:
        By name, ``flops`` of a forward pass of one sample, ``memory`` in bytes, ``seconds`` of a step, and ``ratio``
        of that to a dense one, as median and quartiles; the names `DENSE` and `AGAIN` stand for two dense networks.
    """
    batch = next(task.training_batches(0))
    with torch.random.fork_rng(devices=range(torch.cuda.device_count())):
        torch.manual_seed(0)
        own = Setting(STILL, NO_EVENT)
        trials = {name: _Trial(task, Dense(), own, batch, {}) for name in (DENSE, AGAIN)}
        for name, (run, ranks) in runs.items():
            setting = replace(run.setting, lr=STILL * run.lr, steps=NO_EVENT, ranks=ranks)
            trials[name] = _Trial(task, find_method(run.method), setting, batch, ranks)
        found = {name: {"flops": trial.flops(), "memory": trial.memory()} for name, trial in trials.items()}
        calls: dict[str, Callable[[], Any]] = {name: trial.stepper() for name, trial in trials.items()}
        times = _compared(calls, seconds=seconds * len(calls))
    return {name: {**numbers, **times[name]} for name, numbers in found.items()}


def _compared(calls: Mapping[str, Callable[[], Any]], *, seconds: float) -> dict[str, dict[str, Any]]:
    """Return the CPU time of each call and its ratio to `DENSE` within a round: what slows both leaves it alone."""
    interleaved(calls, rounds=1)  # warms up
    rounds: list[dict[str, float]] = []
    began = perf_counter()
    while len(rounds) < LEAST_ROUNDS or perf_counter() - began < seconds:
        found = interleaved(calls, rounds=2, warmup=0, clock="cpu")  # all in order, then all in reverse
        rounds.append({name: timing.median for name, timing in found.items()})
    times = {}
    for name in calls:
        ratios = [seconds_of[name] / seconds_of[DENSE] for seconds_of in rounds]
        low, middle, high = quantiles(ratios, n=4, method="inclusive")
        ratio = {"median": middle, "low": low, "high": high}
        own = median(seconds_of[name] for seconds_of in rounds)
        times[name] = {"seconds": own, "ratio": ratio, "rounds": len(rounds)}
    return times


class _Trial:
    """A contestant's network at its final ranks, with a batch to train it on."""

    def __init__(
        self,
        task: AbstractTask,
        contestant: AbstractContestant,
        setting: Setting,
        batch: Any,
        ranks: Mapping[str, int],
    ) -> None:
        self.task, self.contestant, self.setting, self.batch = task, contestant, setting, batch
        self.model = contestant.network(task, setting)
        at_ranks_(self.model, ranks)

    def flops(self) -> float:
        """Return the operations of a forward pass of one sample, as deployed."""
        plain = copy.deepcopy(self.model)
        if factored_layers(plain):
            to_plain_(plain)
        return flops(plain, self.batch, forward=self.task.forward) / batch_size(self.batch)

    def memory(self) -> int:
        """Return the most bytes that tensors hold at once in a training step, those of the optimizer included."""
        return peak_memory(self.model, self.batch, forward=self._two_steps)

    def stepper(self) -> Callable[[], Any]:
        """Return a function that takes one training step."""
        self.model.train()
        return partial(train_step, self.task, self.model, self._optimizers(), self.batch)

    def _optimizers(self) -> list[torch.optim.Optimizer]:
        return self.contestant.optimizers(self.task, self.model, self.setting)

    @torch.enable_grad()
    def _two_steps(self, model: nn.Module, batch: Any) -> None:
        optimizers = self._optimizers()  # within what is measured, as is their state, which the first step makes
        model.train()
        for _ in range(2):
            train_step(self.task, model, optimizers, batch)


def at_ranks_(model: nn.Module, ranks: Mapping[str, int]) -> None:
    """Give low-rank layers random factors of these ranks, in place.

    Example:
        >>> from dynarank.layers.linear import LowRankLinear
        >>> model = nn.Sequential(LowRankLinear(30, 20, rank=2))
        >>> at_ranks_(model, {"0": 5})
        >>> model[0].rank
        5
    """
    for name, layer in factored_layers(model).items():
        wanted = [ranks.get(key, rank) for key, rank in layer.ranks_by_name(name).items()]
        if wanted != list(layer.all_ranks):
            layer.randomise_(wanted)
