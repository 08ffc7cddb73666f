"""Training a dense network of a task from scratch: what compression starts from, and the narrower rivals."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import nn

from dynarank.experiments.loop import scheduled
from dynarank.experiments.tasks.base import AbstractTask

Tell = Callable[[int, int, float], None]  # step, steps, loss


@dataclass(frozen=True)
class Silent:
    """Tells nobody how the training goes."""

    def __call__(self, step: int, steps: int, loss: float) -> None: ...


def pretrain(
    task: AbstractTask, *, seed: int = 0, steps: int | None = None, parameters: int | None = None, tell: Tell = Silent()
) -> nn.Module:
    """Train the network of a task, or a narrower one, from scratch.

    Args:
        task: The task.
        seed: Seed of the initial weights and of the batches.
        steps: Optimizer steps; those of the task by default.
        parameters: Largest size of a narrower network; None for the network itself.
        tell: Called every 50 steps with the step, the number of steps and the mean loss since the last call.
    """
    steps = steps or task.training_steps
    torch.manual_seed(seed)
    model = task.model() if parameters is None else task.narrower(parameters)
    optimizers = task.optimizers(model)
    schedulers = [scheduled(optimizer, steps=steps) for optimizer in optimizers]
    batches, total = task.training_batches(seed), 0.0
    model.train()
    for step in range(1, steps + 1):
        batch = next(batches)
        model.zero_grad()
        loss = task.loss(task.forward(model, batch), batch)
        loss.backward()
        for part in (*optimizers, *schedulers):
            part.step()
        total += float(loss.detach())
        if step % 50 == 0:
            tell(step, steps, total / 50)
            total = 0.0
    return model.eval()
