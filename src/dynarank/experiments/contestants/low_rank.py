"""Low-rank training: any integrator on the manifold, with ranks that are found on the way."""

from dataclasses import dataclass
from typing import Any, final

import torch
from torch import nn

from dynarank._discovery import resolve
from dynarank.experiments import methods
from dynarank.experiments.contestants.base import AbstractContestant, Setting, Size
from dynarank.experiments.networks import check_plan
from dynarank.experiments.tasks.base import AbstractTask
from dynarank.factorize import ConvForm, factorize_
from dynarank.integrators.base import AbstractIntegrator
from dynarank.optim.low_rank_optimizer import LowRankOptimizer
from dynarank.ranks.base import AbstractRankPolicy
from dynarank.ranks.budget import Budget
from dynarank.ranks.fixed import Fixed
from dynarank.ranks.relative_tail import RelativeTail
from dynarank.schedules.periodic import Periodic

FREEZE = 0.5  # part of the steps after which ranks stay
BUDGET_START = 3.0  # the budget at the beginning, as a multiple of the budget
START_RANK = 2
EVENTS = 40  # at least about as many in a run


@final
@dataclass(frozen=True)
class LowRank(AbstractContestant):
    """Factors moved by an integrator, ranks that move between layers within the size, AdamW for everything else.

    Args:
        integrator: Name or instance of an integrator.
        momentum: Weight of the past in the averaged gradient.
        weight_decay: Decoupled decay of the low-rank weights.
        start_rank: Rank of every layer at the start, where ranks are found on the way. By default ranks that fill the
            size, the same part of the full rank everywhere; where the size is no number of parameters, 2.
        conv_form: What convolutions become: ``"matrix"``, ``"spatial"``, ``"tucker"`` or ``"tucker4"``.
        include_head: Whether the classifier head is low-rank too.

    Reference:
        Schotthöfer et al., "Low-rank lottery tickets", NeurIPS 2022, https://arxiv.org/abs/2205.13571.
    """

    integrator: str | AbstractIntegrator = "tangent_muon"
    momentum: float = 0.9
    weight_decay: float = 0.0
    start_rank: int | None = None
    conv_form: ConvForm = "matrix"
    include_head: bool = False

    def lr(self, task: AbstractTask) -> float:
        found: Any = resolve("integrator", "dynarank.integrators", AbstractIntegrator, self.integrator)
        return found.typical_lr

    def network(self, task: AbstractTask, setting: Setting) -> nn.Module:
        model, size = task.model(), setting.size or Size()
        start: dict[str, Any] = {"rank": size.rank or self.start_rank or START_RANK}
        if size.fraction is not None and self.start_rank is None:
            start = {"parameters": size.fraction, "keep_dense_above_break_even": False}
        factorize_(model, conv_form=self.conv_form, include_head=self.include_head, **start)
        return model

    def optimizers(self, task: AbstractTask, model: nn.Module, setting: Setting) -> list[torch.optim.Optimizer]:
        freeze = max(1, int(FREEZE * setting.steps))
        policy = policy_of(setting.size, freeze)
        check_plan(model, policy, step=freeze)
        optimizer = LowRankOptimizer(
            model,
            lr=setting.lr,
            momentum=self.momentum,
            weight_decay=self.weight_decay,
            integrator=self.integrator,
            rank_policy=policy,
            schedule=Periodic(max(1, min(25, setting.steps // EVENTS)), freeze=freeze),
            base=torch.optim.AdamW,
            base_options=task.adamw,
        )
        return [optimizer]


def policy_of(size: Size | None, freeze: int) -> AbstractRankPolicy:
    """Return the rank policy of a size; a budget falls to it until ``freeze`` steps."""
    if size is None or size.rank is not None:
        return Fixed()
    if size.fraction is not None:
        return Budget(size.fraction, start=min(1.0, BUDGET_START * size.fraction), steps=freeze)
    if size.tolerance is not None:
        return RelativeTail(size.tolerance)
    name, *options = str(size.policy).split(":")
    return methods.build(methods.RANK_POLICY, name, options)
