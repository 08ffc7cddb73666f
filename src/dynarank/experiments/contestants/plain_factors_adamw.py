"""Two factors trained by AdamW: what everybody does."""

from typing import final

import torch
from torch import nn

from dynarank.experiments.contestants import _recipes
from dynarank.experiments.contestants.base import AbstractContestant, Setting
from dynarank.experiments.tasks.base import AbstractTask
from dynarank.factorize import factorize_


@final
class PlainFactorsAdamW(AbstractContestant):
    """Two factors from the SVD of the initial weights, at fixed ranks, with AdamW on all parameters.

    Ranks are the same part of the full rank everywhere, as large as the low-rank networks of this size allow.

    Reference:
        Khodak, Tenenholtz, Mackey, Fusi, "Initialization and regularization of factorized neural layers", ICLR 2021,
        https://arxiv.org/abs/2105.01029.
    """

    follows = True

    def lr(self, task: AbstractTask) -> float:
        return task.adamw["lr"]

    def network(self, task: AbstractTask, setting: Setting) -> nn.Module:
        model = task.model()
        if setting.size is not None and setting.size.rank is not None:
            factorize_(model, rank=setting.size.rank)
        else:
            factorize_(model, parameters=setting.parameters)
        return model

    def optimizers(self, task: AbstractTask, model: nn.Module, setting: Setting) -> list[torch.optim.Optimizer]:
        return _recipes.adamw(task, model, lr=setting.lr)
