"""Times as sums of non-negative terms, fitted so that relative errors are small and few outliers do not matter."""

import torch
from torch import Tensor

ROUNDS = 10
SMALL = 0.05  # relative errors below count alike


def fit_times(counts: Tensor, seconds: Tensor) -> Tensor:
    """Return ``x >= 0`` with ``counts x`` about ``seconds``, by reweighted least squares of relative errors.

    Large relative errors count by their size, not their square. A column that would need a negative time is left out;
    of several, the most negative one first.

    Args:
        counts: What each time is a sum of, ``(k, terms)`` float64.
        seconds: Measured times, ``(k,)`` float64.

    Example:
        >>> counts = torch.tensor([[1.0, 2.0], [1.0, 5.0], [1.0, 9.0]]).double()
        >>> fit_times(counts, counts @ torch.tensor([3.0, 0.5]).double()).tolist()
        [3.0..., 0.5...]
    """
    relative = counts / seconds.unsqueeze(1)
    scale = torch.linalg.vector_norm(relative, dim=0)
    used = (scale > 0).nonzero().flatten().tolist()
    weights = torch.ones_like(seconds)
    times = torch.zeros_like(scale)
    for _ in range(ROUNDS):
        times = _non_negative(relative / scale.clamp_min(1e-300), weights, used) / scale.clamp_min(1e-300)
        weights = (relative @ times - 1).abs().clamp_min(SMALL).rsqrt()
    return times


def _non_negative(columns: Tensor, weights: Tensor, used: list[int]) -> Tensor:
    """Return ``x >= 0`` that makes ``columns x`` about 1, with only some of the columns."""
    left = list(used)
    found = columns.new_zeros(columns.shape[1])
    while left:
        system = weights.unsqueeze(1) * columns[:, left]
        x = torch.linalg.lstsq(system, weights.unsqueeze(1), driver="gelsd").solution.flatten()
        if bool((x >= 0).all()):
            found[left] = x
            break
        left.pop(int(x.argmin()))
    return found
