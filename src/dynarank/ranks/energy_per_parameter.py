"""A budget of parameters for the whole model that buys energy where it is cheapest."""

from dataclasses import dataclass

import torch
from torch import Tensor

from dynarank import cost, linalg
from dynarank.ranks._budget import AbstractBudget
from dynarank.ranks.base import LayerSpectrum


@dataclass(frozen=True)
class EnergyPerParameter(AbstractBudget):
    """Keeps the directions with the most energy per deployed parameter, ``sigma_i^2 / ||S||_F^2 / (m + n)``.

    Against `Budget`, whose common tolerance asks every layer for the same share of its own energy, small layers win
    over large ones and steep spectra over flat ones: a layer with many equal directions is cut to ``min_rank`` first.
    A fresh random layer is such a layer, so do not start it from dense. At break-even a layer becomes dense and all
    its further energy comes with it: the last directions in factors and that step are one bargain.
    It spends what it is given, on noise too if there is nothing else.

    Args:
        fraction: Deployed parameters allowed, as a fraction of the dense model's (every tensor counts).
        start: Fraction allowed at step 0; the budget falls from it to ``fraction`` along a cubic. Needs ``steps``.
        steps: Step at which ``fraction`` is reached. Needs ``start``.
        growth: Candidates to try at each event, as a fraction of the rank.
        min_rank: Smallest rank of a layer.
        relative: Whether energy counts as a fraction of the layer's own. If not, layers with large weights win.

    Raises:
        ValueError: The budget does not even hold the parameters outside the factors plus ``min_rank`` everywhere.

    Reference:
        A greedy choice of singular values over all layers, as in Idelbayev, Carreira-Perpiñán, "Low-rank compression
        of neural nets: learning the rank of each layer", CVPR 2020, https://doi.org/10.1109/CVPR42600.2020.00807,
        without its optimisation of the loss.
    """

    relative: bool = True

    def worth(self, spectrum: LayerSpectrum) -> Tensor:
        """Return the energy that each direction brings per parameter that it costs."""
        m, n = spectrum.shape
        sigma = spectrum.sigma
        if self.relative:
            sigma = sigma / sigma.norm().clamp_min(torch.finfo(torch.float64).tiny)
        worth = sigma.square() / (m + n)
        last = cost.break_even_rank(m, n)  # the largest rank in factors; the next direction makes the layer dense
        if last < len(sigma):
            self._price_dense(worth, linalg.tails(sigma), last, (m, n))
        return worth

    def _price_dense(self, worth: Tensor, tails: Tensor, last: int, shape: tuple[int, int]) -> None:
        """Give all directions on the way to dense, from where it is the better bargain, what they bring together."""
        m, n = shape
        for rank in range(last, -1, -1):
            together = tails[rank].square() / (m * n - cost.factor_parameters(m, n, rank))
            worth[rank:] = together
            if rank == 0 or together <= worth[rank - 1]:
                return
