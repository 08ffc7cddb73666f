"""The dense network trained by AdamW."""

from typing import final

import torch
from torch import nn

from dynarank.experiments.contestants import _recipes
from dynarank.experiments.contestants.base import AbstractContestant, Setting
from dynarank.experiments.tasks.base import AbstractTask


@final
class DenseAdamW(AbstractContestant):
    """The dense network, trained by AdamW.

    Reference:
        Loshchilov, Hutter, "Decoupled weight decay regularization", ICLR 2019, https://arxiv.org/abs/1711.05101.
    """

    sized = False

    def lr(self, task: AbstractTask) -> float:
        return task.adamw["lr"]

    def network(self, task: AbstractTask, setting: Setting) -> nn.Module:
        return task.model()

    def optimizers(self, task: AbstractTask, model: nn.Module, setting: Setting) -> list[torch.optim.Optimizer]:
        return _recipes.adamw(task, model, lr=setting.lr)
