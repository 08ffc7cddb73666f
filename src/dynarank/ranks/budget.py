"""A budget of parameters for the whole model, shared out by what each direction is worth."""

from dataclasses import dataclass

import torch
from torch import Tensor

from dynarank import linalg
from dynarank.ranks._budget import AbstractBudget
from dynarank.ranks.base import LayerSpectrum


@dataclass(frozen=True)
class Budget(AbstractBudget):
    """Keeps the deployed model within a fraction of the dense parameters by one relative tail for all layers.

    The common tolerance ``theta`` is the smallest for which truncating every layer to a tail of
    ``theta * ||sigma||_2`` fits the budget; what is then left is filled up with the next best directions. A layer at
    or above its break-even rank counts as dense, so its further directions are free. It spends what it is given,
    on noise too if there is nothing else.

    Args:
        fraction: Deployed parameters allowed, as a fraction of the dense model's (every tensor counts).
        start: Fraction allowed at step 0; the budget falls from it to ``fraction`` along a cubic. Needs ``steps``.
        steps: Step at which ``fraction`` is reached. Needs ``start``.
        growth: Candidates to try at each event, as a fraction of the rank.
        min_rank: Smallest rank of a layer.

    Raises:
        ValueError: The budget does not even hold the parameters outside the factors plus ``min_rank`` everywhere.
    """

    def worth(self, spectrum: LayerSpectrum) -> Tensor:
        """Return the relative tail that each direction would leave behind if it were cut: one common ``theta``."""
        norm = spectrum.sigma.norm().clamp_min(torch.finfo(torch.float64).tiny)
        return linalg.tails(spectrum.sigma)[:-1] / norm
