"""Well-conditioned low-rank weights: a penalty for singular values that differ, to add to any loss."""

from typing import Any

import torch
from torch import Tensor, nn

from dynarank import linalg, tucker
from dynarank.layers._factored import factored_layers
from dynarank.layers._tucker import AbstractTuckerLayer


def condition_penalty(model: nn.Module) -> Tensor:
    """Return ``sum ||S^T S - alpha^2 I||_F^2`` over all low-rank layers, with ``alpha^2 = ||S||_F^2 / r`` in each.

    It is ``sum_i (sigma_i^2 - mean sigma^2)^2`` over the ``r`` directions of a layer: zero where they are all equal. It
    depends on the weight alone, not on how that is split into factors, and takes ``r x r`` products only. A layer in
    Tucker form adds the penalty of each factored mode, with the singular values of its unfolding. Add it to the
    loss in any training loop: ``loss = loss + beta * condition_penalty(model)``. Singular values enter to the fourth
    power, so ``beta`` goes with the scale of the weights. It pulls new candidates up too: use a policy that rarely
    grows, or none.

    Args:
        model: A low-rank layer, or a model that holds some.

    Shape:
        A scalar in at least float32, differentiable in the factors.

    Raises:
        ValueError: There is no low-rank layer.

    Example:
        >>> from dynarank.factors import from_dense
        >>> from dynarank.layers.linear import LowRankLinear
        >>> layer = LowRankLinear(3, 3, rank=2)
        >>> layer.set_factors(from_dense(torch.diag(torch.tensor([3.0, 1.0, 0.0])), rank=2))
        >>> round(condition_penalty(layer).item(), 3)  # (9 - 5)^2 + (1 - 5)^2
        32.0

    Reference:
        Schotthöfer, Yang, Schnake, "Dynamical low-rank compression of neural networks with robustness under
        adversarial attacks", 2025, https://arxiv.org/abs/2505.08022. The norm is squared here: smooth at its minimum.
    """
    layers = list(factored_layers(model).values())
    if not layers:
        raise ValueError("condition_penalty found no low-rank layer in the model. Call factorize_(model) first.")
    penalties = [_penalty(gram) for layer in layers for gram in _grams(layer)]
    return torch.stack([penalty.to(penalties[0].device) for penalty in penalties]).sum()


def _penalty(gram: Tensor) -> Tensor:
    excess = gram - gram.trace() / len(gram) * torch.eye(len(gram), dtype=gram.dtype, device=gram.device)
    return (excess * excess.mT).sum()  # trace of its square: the eigenvalues are what counts, the basis is not


def _grams(layer: Any) -> list[Tensor]:
    if isinstance(layer, AbstractTuckerLayer):
        return _mode_grams(layer)
    return [_gram(layer)]


def _mode_grams(layer: AbstractTuckerLayer) -> list[Tensor]:
    """Return for each mode ``U^T U C (x_j U_j^T U_j) C^T`` with unfolded cores, whose eigenvalues are ``sigma^2``."""
    point = layer.tucker_point(detached=False)
    core, bases = linalg.widen(point.core), [None if U is None else linalg.widen(U) for U in point.bases]
    with torch.autocast(core.device.type, enabled=False):
        inner = [None if U is None else U.mT @ U for U in bases]  # (r, r)
        found = []
        for mode, gram in enumerate(inner):
            if gram is not None:
                seen = tucker.unfold(tucker.multiply(core, inner, skip=mode), mode)
                found.append(gram @ seen @ tucker.unfold(core, mode).mT)
        return found


def _gram(layer: Any) -> Tensor:
    """Return a matrix ``(r, r)`` with the eigenvalues ``sigma^2``: in the pair form ``A A^T B B^T``, not symmetric."""
    if layer.A is not None and layer.B is not None:
        A, B = linalg.widen(layer.A[: layer.rank]), linalg.widen(layer.B[: layer.rank])
        with torch.autocast(A.device.type, enabled=False):
            return (A @ A.mT) @ (B @ B.mT)
    assert layer.S is not None
    S = linalg.widen(layer.S)  # rectangular where one basis could not grow as far as the other
    with torch.autocast(S.device.type, enabled=False):
        return S @ S.mT if S.shape[0] <= S.shape[1] else S.mT @ S
