"""What contestants share that start with full rank: their networks, and the ranks of a size."""

from dataclasses import dataclass, field
from math import prod
from typing import Literal, final

import torch
from torch import Tensor, nn

from dynarank.dense_start.dense_start import DenseStart
from dynarank.experiments.contestants.base import Setting, Size
from dynarank.experiments.contestants.low_rank import policy_of
from dynarank.experiments.tasks.base import AbstractTask
from dynarank.factorize import ConvForm, factorize_
from dynarank.layers.base import low_rank_layers
from dynarank.ranks._budget import AbstractBudget
from dynarank.ranks.base import AbstractRankPolicy, LayerSpectrum, PlanContext
from dynarank.ranks.fixed import Fixed
from dynarank.ranks.fraction import Fraction

REFRESHES = 40  # looks or refreshes: at least about as many in a run


def dense_network(
    task: AbstractTask, setting: Setting, *, conv_form: ConvForm, form: Literal["pair", "core"]
) -> nn.Module:
    """Return the dense network; where the cost at certain ranks is asked for, with low-rank layers of these ranks."""
    model = task.model()
    if setting.ranks:
        ranks = dict(setting.ranks)
        factorize_(model, target_modules=list(ranks), rank_pattern=ranks, conv_form=conv_form)
        for layer in low_rank_layers(model).values():
            layer.set_factors(layer.factors(), form=form)
    return model


def shrinking_policy(size: Size | None, freeze: int) -> AbstractRankPolicy:
    """Return the rank policy of a size for layers that start with full rank."""
    return Fixed(size.rank) if size is not None and size.rank is not None else policy_of(size, freeze)


def proportional_policy(size: Size | None, rule: AbstractRankPolicy) -> AbstractRankPolicy:
    """Return the ranks of a size once: in the proportions of a rule where the size is a number of parameters."""
    if size is None:
        return rule
    return shrinking_policy(size, 1) if size.fraction is None else InProportion(size.fraction, rule=rule)


def check_size(start: DenseStart, *, step: int = 0) -> None:
    """Ask the rank policy of a dense start for a plan, so that a size that cannot be met is refused before training.

    Args:
        start: The dense start.
        step: The step of the plan.

    Raises:
        ValueError: As the policy says.
    """
    spectra = [
        LayerSpectrum(name, torch.linspace(1.0, 0.5, layer.full, dtype=torch.float64), layer.shape)
        for name, layer in start.candidates.items()
    ]
    dense = start.dense_parameters
    others = dense - sum(prod(spectrum.shape) for spectrum in spectra)
    start.rank_policy.plan(spectra, PlanContext(step, dense, others))


@final
@dataclass(frozen=True)
class InProportion(AbstractBudget):
    """Fills a budget with ranks in the proportions in which another policy would keep them.

    Args:
        fraction: Deployed parameters allowed, as a fraction of the dense model's.
        rule: The other policy.

    Example:
        >>> layers = [LayerSpectrum("a", torch.ones(8), (8, 8)), LayerSpectrum("b", torch.ones(4), (4, 4))]
        >>> plan = InProportion(0.5, rule=Fraction(0.5)).plan(layers, PlanContext(0, 80, 0))
        >>> [decision.rank for decision in plan]
        [2, 1]
    """

    growth: float = 0.0
    min_rank: int = 1
    rule: AbstractRankPolicy = field(default_factory=Fraction)

    def worth(self, spectrum: LayerSpectrum) -> Tensor:
        """Return the rank that the rule would keep, over the position of each direction."""
        (wanted,) = self.rule.plan([spectrum], PlanContext(0, 0, 0))
        return wanted.rank / torch.arange(1, len(spectrum.sigma) + 1, dtype=torch.float64)
