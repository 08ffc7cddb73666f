"""One training of a comparison, from its settings to its outcome."""

import json
import math
import time
from dataclasses import asdict, dataclass
from typing import Any, final

import torch
from torch import Tensor, nn

from dynarank.errors import NonFiniteGradientError
from dynarank.experiments.contest.methods import find_method
from dynarank.experiments.contestants.base import Setting, Size
from dynarank.experiments.loop import scheduled
from dynarank.experiments.pretraining import Tell
from dynarank.experiments.tasks.base import AbstractTask, Quality
from dynarank.factorize import deployed_parameters, trainable_parameters
from dynarank.layers._factored import factored_layers, ranks_held
from dynarank.optim.low_rank_optimizer import LowRankOptimizer
from dynarank.optim.steps import take_step

TOLD_EVERY = 50
# What the code of a method raises when it is wrong; the others go on.
FAILURES = (
    ArithmeticError,
    AssertionError,
    AttributeError,
    ImportError,
    LookupError,
    MemoryError,
    RuntimeError,
    TypeError,
    ValueError,
)


class DivergedError(RuntimeError):
    """A training whose loss is not finite any more."""


@final
@dataclass(frozen=True)
class Run:
    """One training.

    Args:
        task: Name or file of the task.
        method: Word that names the contestant.
        size: How small the network is to be, or None.
        parameters: What low-rank networks of this size store, where the contestant follows them.
        lr: Largest learning rate.
        seed: Seed of the initial weights and of the batches.
        steps: Optimizer steps.
        final: Whether it is reported, and looks at the test part; else it helps to choose a learning rate.
    """

    task: str
    method: str
    size: Size | None
    parameters: int | None
    lr: float
    seed: int
    steps: int
    final: bool

    @property
    def setting(self) -> Setting:
        """What the contestant is given."""
        return Setting(self.lr, self.steps, self.size, self.parameters)

    @property
    def label(self) -> str:
        """What it is called while it runs.

        Example:
            >>> Run("gpt", "tangent_muon", Size(rank=8), None, 0.05, 100, 500, False).label
            'tangent_muon at rank 8, lr 0.05, tuning'
        """
        size = f" at {self.size.label}" if self.size is not None else ""
        return f"{self.method}{size}, lr {self.lr:g}, {f'seed {self.seed}' if self.final else 'tuning'}"

    @property
    def key(self) -> str:
        """What tells it from every other run."""
        return json.dumps(asdict(self), sort_keys=True)

    @classmethod
    def of(cls, key: str) -> "Run":
        """Return the run with that key."""
        values = json.loads(key)
        return cls(**values | {"size": None if values["size"] is None else Size(**values["size"])})


def attempt(run: Run, task: AbstractTask, *, tell: Tell) -> dict[str, Any]:
    """Carry out a run and return its outcome; one that diverges or whose method fails has that for an outcome."""
    try:
        return carry_out(run, task, tell=tell)
    except (NonFiniteGradientError, DivergedError, torch.linalg.LinAlgError) as error:
        return {"diverged": str(error)}
    except FAILURES as error:
        return {"failed": f"{type(error).__name__}: {error}"}


def carry_out(run: Run, task: AbstractTask, *, tell: Tell) -> dict[str, Any]:
    """Train a network and return how well it does at the last step, what it stores, and its ranks.

    The global generator is seeded for the time of the training and left as it was.

    Raises:
        DivergedError: The loss is not finite any more.
    """
    contestant, setting = find_method(run.method), run.setting
    with torch.random.fork_rng(devices=range(torch.cuda.device_count())):
        torch.manual_seed(run.seed)
        model = contestant.network(task, setting)
        optimizers = contestant.optimizers(task, model, setting)
        began = time.perf_counter()
        train(task, model, optimizers, seed=run.seed, steps=run.steps, tell=tell)
        seconds = time.perf_counter() - began
    parts = ("validation", "test") if run.final else ("validation",)
    return {
        **{part: asdict(_judged(task, model, part)) for part in parts},
        "parameters": deployed_parameters(model),
        "trainable": trainable_parameters(model),
        "ranks": ranks_held(factored_layers(model)),
        "seconds": round(seconds, 3),
    }


def train(
    task: AbstractTask,
    model: nn.Module,
    optimizers: list[torch.optim.Optimizer],
    *,
    seed: int,
    steps: int,
    tell: Tell,
) -> None:
    """Train with warm-up and cosine decay to 0; at the end ranks are frozen and all factors in their pair form."""
    schedulers = [scheduled(optimizer, steps=steps) for optimizer in optimizers]
    batches, total = task.training_batches(seed), 0.0
    model.train()
    for step in range(1, steps + 1):
        loss = float(train_step(task, model, optimizers, next(batches)))
        if not math.isfinite(loss):
            raise DivergedError(f"the loss is {loss} at step {step}.")
        for scheduler in schedulers:
            scheduler.step()
        total += loss
        if step % TOLD_EVERY == 0:
            tell(step, steps, total / TOLD_EVERY)
            total = 0.0
    for optimizer in optimizers:
        if isinstance(optimizer, LowRankOptimizer):
            optimizer.freeze_ranks()


def train_step(task: AbstractTask, model: nn.Module, optimizers: list[torch.optim.Optimizer], batch: Any) -> Tensor:
    """Take one training step and return the loss before it.

    An optimizer whose integrator takes several gradients gets them.
    """

    def gradients() -> Tensor:
        model.zero_grad()
        loss = task.loss(task.forward(model, batch), batch)
        loss.backward()
        return loss.detach()

    first, *others = sorted(optimizers, key=lambda optimizer: not isinstance(optimizer, LowRankOptimizer))
    loss = take_step(first, gradients)
    for optimizer in others:
        optimizer.step()
    return loss


def _judged(task: AbstractTask, model: nn.Module, part: str) -> Quality:
    quality = task.evaluate(model.eval(), part)
    if not math.isfinite(quality.loss):
        raise DivergedError(f"the loss on the {part} part is {quality.loss}.")
    return quality
