"""Low-rank training at fixed ranks, the same part of the full rank in every layer: what adaptive ranks must beat."""

from dataclasses import dataclass
from typing import Any, final

import torch
from torch import nn

from dynarank.experiments.contestants.base import AbstractContestant, Setting
from dynarank.experiments.contestants.low_rank import LowRank
from dynarank.experiments.tasks.base import AbstractTask
from dynarank.factorize import ConvForm, factorize_
from dynarank.integrators.base import AbstractIntegrator
from dynarank.optim.low_rank_optimizer import LowRankOptimizer


@final
@dataclass(frozen=True)
class UniformRanks(AbstractContestant):
    """Factors moved by an integrator at the same part of the full rank everywhere, as large as the others of this size.

    Args:
        integrator: Name or instance of an integrator.
        momentum: Weight of the past in the averaged gradient.
        conv_form: What convolutions become: ``"matrix"``, ``"spatial"``, ``"tucker"`` or ``"tucker4"``.
        include_head: Whether the classifier head is low-rank too.

    Reference:
        Schotthöfer et al., "Low-rank lottery tickets", NeurIPS 2022, https://arxiv.org/abs/2205.13571, at fixed rank.
    """

    integrator: str | AbstractIntegrator = "tangent_muon"
    momentum: float = 0.9
    conv_form: ConvForm = "matrix"
    include_head: bool = False

    follows = True

    def lr(self, task: AbstractTask) -> float:
        return LowRank(self.integrator).lr(task)

    def network(self, task: AbstractTask, setting: Setting) -> nn.Module:
        model = task.model()
        form: dict[str, Any] = {"conv_form": self.conv_form, "include_head": self.include_head}
        factorize_(model, parameters=setting.parameters, **form)
        return model

    def optimizers(self, task: AbstractTask, model: nn.Module, setting: Setting) -> list[torch.optim.Optimizer]:
        optimizer = LowRankOptimizer(
            model,
            lr=setting.lr,
            momentum=self.momentum,
            integrator=self.integrator,
            rank_policy="fixed",
            base=torch.optim.AdamW,
            base_options=task.adamw,
        )
        return [optimizer]
