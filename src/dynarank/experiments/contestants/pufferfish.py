"""Pufferfish: full rank at first, then two factors of a fixed part of the rank."""

from dataclasses import dataclass
from typing import final

import torch
from torch import nn

from dynarank.dense_start.pufferfish import pufferfish
from dynarank.experiments.contestants import _recipes
from dynarank.experiments.contestants._dense_start import check_size, dense_network, proportional_policy
from dynarank.experiments.contestants.base import AbstractContestant, Setting
from dynarank.experiments.tasks.base import AbstractTask
from dynarank.factorize import ConvForm
from dynarank.ranks.fraction import Fraction


@final
@dataclass(frozen=True)
class Pufferfish(AbstractContestant):
    """Full rank with AdamW at first, then two factors of the same part of the rank everywhere that fill the size.

    Where no number of parameters is given, ranks are those of the size, looked for once.

    Args:
        delay: Part of the steps with full rank.
        conv_form: What convolutions become: ``"matrix"`` or ``"spatial"``.

    Reference:
        Wang, Agarwal, Papailiopoulos, "Pufferfish: communication-efficient models at no extra cost", MLSys 2021,
        https://arxiv.org/abs/2103.03936. There some of the first layers stay dense too.
    """

    delay: float = 0.2
    conv_form: ConvForm = "matrix"

    def lr(self, task: AbstractTask) -> float:
        return task.adamw["lr"]

    def network(self, task: AbstractTask, setting: Setting) -> nn.Module:
        return dense_network(task, setting, conv_form=self.conv_form, form="pair")

    def optimizers(self, task: AbstractTask, model: nn.Module, setting: Setting) -> list[torch.optim.Optimizer]:
        (optimizer,) = _recipes.adamw(task, model, lr=setting.lr)
        if not setting.ranks:
            delay, policy = int(self.delay * setting.steps), proportional_policy(setting.size, Fraction())
            check_size(pufferfish(model, optimizer, delay=delay, rank_policy=policy, conv_form=self.conv_form))
        return [optimizer]
