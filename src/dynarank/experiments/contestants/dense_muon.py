"""The dense network trained by Muon: the strongest plain training here."""

from dataclasses import dataclass
from typing import final

import torch
from torch import nn

from dynarank.experiments.contestants import _recipes
from dynarank.experiments.contestants.base import AbstractContestant, Setting
from dynarank.experiments.tasks.base import AbstractTask


@final
@dataclass(frozen=True)
class DenseMuon(AbstractContestant):
    """The dense network, its matrices trained by Muon and everything else by AdamW.

    Args:
        weight_decay: Decoupled decay of the matrices.

    Reference:
        Jordan et al., "Muon: an optimizer for hidden layers in neural networks", 2024,
        https://kellerjordan.github.io/posts/muon.
    """

    weight_decay: float = 0.0

    sized = False

    def lr(self, task: AbstractTask) -> float:
        return _recipes.MUON_LR

    def network(self, task: AbstractTask, setting: Setting) -> nn.Module:
        return task.model()

    def optimizers(self, task: AbstractTask, model: nn.Module, setting: Setting) -> list[torch.optim.Optimizer]:
        return _recipes.muon(task, model, lr=setting.lr, weight_decay=self.weight_decay)
