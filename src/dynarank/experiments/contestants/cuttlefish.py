"""Cuttlefish: full rank until the stable ranks have settled, then two factors of the scaled stable ranks."""

from dataclasses import dataclass
from typing import final

import torch
from torch import nn

from dynarank.dense_start.cuttlefish import cuttlefish
from dynarank.experiments.contestants import _recipes
from dynarank.experiments.contestants._dense_start import (
    REFRESHES,
    check_size,
    dense_network,
    proportional_policy,
)
from dynarank.experiments.contestants.base import AbstractContestant, Setting
from dynarank.experiments.tasks.base import AbstractTask
from dynarank.factorize import ConvForm
from dynarank.ranks.scaled_stable_rank import ScaledStableRank


@final
@dataclass(frozen=True)
class Cuttlefish(AbstractContestant):
    """Full rank with AdamW until stable ranks have settled, then two factors in their proportions that fill the size.

    Where no number of parameters is given, ranks are those of the size, looked for once: with the rank policy
    ``scaled_stable_rank`` that is the published rule.

    Args:
        latest: Part of the steps after which layers go low-rank even where stable ranks have not settled, so that the
            network has its size; published runs are long enough to wait.
        conv_form: What convolutions become: ``"matrix"`` or ``"spatial"``.

    Reference:
        Wang, Agarwal, U-chupala, Tanaka, Xing, Papailiopoulos, "Cuttlefish: low-rank model training without all the
        tuning", MLSys 2023, https://arxiv.org/abs/2305.02538.
    """

    latest: float = 0.5
    conv_form: ConvForm = "matrix"

    def lr(self, task: AbstractTask) -> float:
        return task.adamw["lr"]

    def network(self, task: AbstractTask, setting: Setting) -> nn.Module:
        return dense_network(task, setting, conv_form=self.conv_form, form="pair")

    def optimizers(self, task: AbstractTask, model: nn.Module, setting: Setting) -> list[torch.optim.Optimizer]:
        (optimizer,) = _recipes.adamw(task, model, lr=setting.lr)
        if not setting.ranks:
            start = cuttlefish(
                model,
                optimizer,
                every=max(1, setting.steps // REFRESHES),
                latest=max(1, int(self.latest * setting.steps)),
                rank_policy=proportional_policy(setting.size, ScaledStableRank(growth=0)),
                conv_form=self.conv_form,
            )
            check_size(start)
        return [optimizer]
