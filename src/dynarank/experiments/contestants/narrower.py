"""A narrower dense network of the same size: the control that a sceptic asks for first."""

from typing import final

import torch
from torch import nn

from dynarank.experiments.contestants import _recipes
from dynarank.experiments.contestants.base import AbstractContestant, Setting
from dynarank.experiments.tasks.base import AbstractTask


@final
class Narrower(AbstractContestant):
    """A narrower dense network, never smaller than the low-rank ones, trained by the task's own recipe."""

    follows = True

    def lr(self, task: AbstractTask) -> float:
        return 1.0

    def network(self, task: AbstractTask, setting: Setting) -> nn.Module:
        return _recipes.narrower(task, setting.parameters or 0)

    def optimizers(self, task: AbstractTask, model: nn.Module, setting: Setting) -> list[torch.optim.Optimizer]:
        return _recipes.own_recipe(task, model, factor=setting.lr)
