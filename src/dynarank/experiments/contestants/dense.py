"""The dense network as its task trains it."""

from typing import final

import torch
from torch import nn

from dynarank.experiments.contestants import _recipes
from dynarank.experiments.contestants.base import AbstractContestant, Setting
from dynarank.experiments.tasks.base import AbstractTask


@final
class Dense(AbstractContestant):
    """The dense network, trained by the task's own recipe; learning rates are factors of its own."""

    sized = False

    def lr(self, task: AbstractTask) -> float:
        return 1.0

    def network(self, task: AbstractTask, setting: Setting) -> nn.Module:
        return task.model()

    def optimizers(self, task: AbstractTask, model: nn.Module, setting: Setting) -> list[torch.optim.Optimizer]:
        return _recipes.own_recipe(task, model, factor=setting.lr)
