"""A penalty that empties the last directions first."""

import torch
from torch import Tensor, nn

from dynarank import linalg
from dynarank.elastic._active import elastic_layers
from dynarank.layers.base import AbstractLowRankLayer


def hierarchical_group_lasso(model: nn.Module) -> Tensor:
    """Return ``sum_k (||A[k:]||_F + ||B[k:]||_F)`` over all low-rank layers: the last direction is in every group.

    It is the term that Maestro adds to the loss, ``loss = loss + weight * hierarchical_group_lasso(model)``, so that
    directions that the data do not need go to zero together with all that come after them. In the balanced gauge it is
    ``2 sum_k sqrt(sigma_k + ... + sigma_r)``.

    Args:
        model: A low-rank layer, or a model that holds some, in the pair form.

    Shape:
        A scalar in at least float32, differentiable in the factors; at rows of zeros its gradient is zero.

    Raises:
        ValueError: There is no low-rank layer, or one is in Tucker or core form.

    Example:
        >>> from dynarank.factors import FactorPair
        >>> from dynarank.layers.linear import LowRankLinear
        >>> layer = LowRankLinear(2, 2, rank=2)
        >>> layer.set_factors(FactorPair(torch.tensor([[3.0, 0.0], [0.0, 4.0]]), torch.zeros(2, 2)))
        >>> hierarchical_group_lasso(layer).item()  # sqrt(9 + 16) + sqrt(16)
        9.0

    Reference:
        S. Horváth, S. Laskaridis, S. Rajput, H. Wang, "Maestro: uncovering low-rank structures via trainable
        decomposition", ICML 2024, https://arxiv.org/abs/2308.14929.
    """
    layers = elastic_layers(model, owner="hierarchical_group_lasso")
    terms = [_suffix_norms(factor).sum() for name, layer in layers.items() for factor in _pair_of(name, layer)]
    return torch.stack([term.to(terms[0].device) for term in terms]).sum()


def _pair_of(name: str, layer: AbstractLowRankLayer) -> tuple[Tensor, Tensor]:
    if layer.A is None or layer.B is None:
        raise ValueError(
            f"hierarchical_group_lasso: {name or 'the layer'} is in the core form, which has no factors A and B. "
            "Use optimizer.freeze_ranks() or layer.set_factors(layer.factors(), form='pair')."
        )
    return layer.A[: layer.rank], layer.B[: layer.rank]


def _suffix_norms(factor: Tensor) -> Tensor:
    """Return the norms of the last r, r - 1, ..., 1 rows of ``(r, m)``."""
    squares = linalg.widen(factor).square().sum(-1).flip(0).cumsum(0)
    # The root has no slope at 0: rows of zeros are left out before it is taken.
    return torch.where(squares > 0, squares, torch.ones_like(squares)).sqrt() * (squares > 0)
