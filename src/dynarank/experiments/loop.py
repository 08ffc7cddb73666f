"""Steps of one network: forward, backward, optimizer, scheduler, and the numbers of the epoch so far."""

import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, final

import torch
from torch import nn
from torch.optim.lr_scheduler import LambdaLR

from dynarank.data import Batches
from dynarank.experiments.problem import Problem
from dynarank.experiments.processes import Processes
from dynarank.optim.steps import take_step

WARM_UP = 100  # steps in which the learning rate rises, at most a tenth of the run


@dataclass(frozen=True)
class Trainee:
    """A network with all that moves it.

    Args:
        model: The network itself.
        forward: What is called in training: the network, or its wrapper for several processes.
        optimizer: Its optimizer.
        scheduler: Its learning rates.
    """

    model: nn.Module
    forward: nn.Module
    optimizer: torch.optim.Optimizer
    scheduler: LambdaLR


def learning_rate(step: int, *, steps: int) -> float:
    """Return the learning rate after ``step`` of ``steps`` steps, as a part of the largest one.

    It rises linearly, then falls to 0 along a cosine.

    Example:
        >>> [round(learning_rate(step, steps=100), 3) for step in (0, 9, 10, 55, 100)]
        [0.1, 1.0, 1.0, 0.5, 0.0]
    """
    rise = min(WARM_UP, max(1, steps // 10))
    if step < rise:
        return (step + 1) / rise
    return 0.5 * (1 + math.cos(math.pi * (step - rise) / max(1, steps - rise)))


def scheduled(optimizer: torch.optim.Optimizer, *, steps: int, offset: int = 0) -> LambdaLR:
    """Return the scheduler of an optimizer that takes over a run of ``steps`` steps after ``offset`` of them."""
    return LambdaLR(optimizer, lambda step: learning_rate(step + offset, steps=steps))


def make_batches(problem: Problem, processes: Processes) -> Batches:
    """Return the training batches of a run, the same for every network that is trained with its settings."""
    splits, config = problem.splits, problem.config
    assert config.batch_size is not None
    return Batches(
        splits.train_inputs,
        splits.train_targets,
        config.batch_size,
        torch.Generator().manual_seed(config.seed),
        process=processes.process,
        processes=processes.number,
    )


@final
class Loop:
    """Takes training steps and keeps the time they take.

    Args:
        problem: Data and loss.
        processes: Who else takes part.
        batches: Where the data come from.
        seconds: Seconds that earlier steps took, for a run that goes on.
    """

    def __init__(self, problem: Problem, processes: Processes, batches: Batches, *, seconds: float = 0.0) -> None:
        self.problem = problem
        self.processes = processes
        self.batches = batches
        self.seconds = seconds
        self._loss = torch.zeros(())
        self._correct: list[torch.Tensor] = []
        self._seen = 0

    def take_step(self, trainee: Trainee, *, before_update: Callable[[], Any] | None = None) -> None:
        """Take one step; ``before_update`` is called while the gradients are there and the state is still the old."""
        start = time.perf_counter()
        inputs, targets = self.batches.next_batch()
        first: list[torch.Tensor] = []

        def gradients() -> torch.Tensor:
            outputs = trainee.forward(inputs)
            loss = self.problem.loss(outputs, targets)
            trainee.optimizer.zero_grad(set_to_none=True)
            loss.backward()
            if not first:
                first.extend((loss.detach(), self.problem.correct(outputs, targets)))
                if before_update is not None:
                    before_update()
            return loss.detach()

        take_step(trainee.optimizer, gradients)
        self._loss, correct = first
        self._correct.append(correct)
        self._seen += len(inputs)
        trainee.scheduler.step()
        self.seconds += time.perf_counter() - start

    def loss(self) -> float:
        """Return the loss of the last batch, over all processes."""
        return float(self.processes.total(self._loss)) / self.processes.number

    def end_epoch(self) -> float | None:
        """Return the accuracy over the batches since the last call, None for regression."""
        start = time.perf_counter()
        self.processes.settle()
        self.seconds += time.perf_counter() - start
        counts = torch.tensor([float(torch.stack(self._correct).sum()), self._seen], dtype=torch.float64)
        correct, seen = self.processes.total(counts).tolist()
        self._correct, self._seen = [], 0
        return None if self.problem.splits.classes is None else correct / seen
