"""OIALR: full rank first, then frozen bases with a trained core, or bases that move on."""

from dataclasses import dataclass
from typing import final

import torch
from torch import nn

from dynarank.dense_start.oialr import oialr
from dynarank.experiments.contestants import _recipes
from dynarank.experiments.contestants._dense_start import REFRESHES, check_size, dense_network, shrinking_policy
from dynarank.experiments.contestants.base import AbstractContestant, Setting
from dynarank.experiments.contestants.low_rank import FREEZE, LowRank
from dynarank.experiments.muon import MuonAdamW
from dynarank.experiments.tasks.base import AbstractTask
from dynarank.factorize import ConvForm
from dynarank.optim.low_rank_optimizer import LowRankOptimizer
from dynarank.ranks.base import AbstractRankPolicy
from dynarank.schedules.base import AbstractSchedule
from dynarank.schedules.periodic import Periodic

WEIGHT_DECAY = 0.1  # of Muon


@final
@dataclass(frozen=True)
class OIALR(AbstractContestant):
    """Full rank with AdamW at first, then only the cores between frozen bases, with ranks that are cut.

    Args:
        delay: Part of the steps with full rank.
        moving: Whether bases move after the switch, by ``tangent_muon``, and ranks may grow again. Learning rates that
            are tried are then those of the factors.
        keep_dense: Whether a layer stays dense until a cut makes it smaller.
        window: Part of the layers by which the window of cut layers grows at each refresh; 1 for all at once.
        conv_form: What convolutions become: ``"matrix"`` or ``"spatial"``.
        muon: Whether Muon moves the weights while they have full rank, and the cores afterwards, instead of AdamW.
            Learning rates are then those of Muon and of the factors.

    Reference:
        Coquelin, Flügel, Weiel, Kiefer, Debus, Streit, Götz, "Harnessing orthogonality to train low-rank neural
        networks", 2024, https://arxiv.org/abs/2401.08505.
    """

    delay: float = 0.2
    moving: bool = False
    keep_dense: bool = True
    window: float = 0.25
    conv_form: ConvForm = "matrix"
    muon: bool = False

    def lr(self, task: AbstractTask) -> float:
        return LowRank().lr(task) if self.moving or self.muon else task.adamw["lr"]

    def network(self, task: AbstractTask, setting: Setting) -> nn.Module:
        return dense_network(task, setting, conv_form=self.conv_form, form="pair" if self.moving else "core")

    def optimizers(self, task: AbstractTask, model: nn.Module, setting: Setting) -> list[torch.optim.Optimizer]:
        every, freeze = max(1, setting.steps // REFRESHES), max(1, int(FREEZE * setting.steps))
        policy = shrinking_policy(setting.size, freeze)
        optimizer = self._optimizer(task, model, setting, policy, Periodic(every, freeze=freeze))
        if not setting.ranks:
            # A budget that ranks are to share out among themselves needs all layers at once.
            shared = self.moving and setting.size is not None and setting.size.fraction is not None
            start = oialr(
                model,
                optimizer,
                delay=int(self.delay * setting.steps),
                every=every,
                rank_policy=policy,
                window=None if self.moving else self.window,
                keep_dense=self.keep_dense and not shared,
                conv_form=self.conv_form,
            )
            check_size(start, step=freeze)
        return [optimizer]

    def _optimizer(
        self,
        task: AbstractTask,
        model: nn.Module,
        setting: Setting,
        policy: AbstractRankPolicy,
        schedule: AbstractSchedule,
    ) -> torch.optim.Optimizer:
        base, options = torch.optim.AdamW, {**task.adamw, **({} if self.moving else {"lr": setting.lr})}
        if self.muon:
            base, options = MuonAdamW, _recipes.muon_options(task, model, lr=setting.lr, weight_decay=WEIGHT_DECAY)
        if not self.moving:
            return base(model.parameters(), **options)
        return LowRankOptimizer(
            model,
            lr=setting.lr,
            rank_policy=policy,
            schedule=schedule,
            base=base,
            base_options=options,
            dense_start=True,
        )
