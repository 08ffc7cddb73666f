"""A training step that fits every optimizer: one gradient, or as many as the integrator takes."""

from collections.abc import Callable
from typing import Any

import torch

from dynarank.optim.low_rank_optimizer import LowRankOptimizer


def take_step(optimizer: torch.optim.Optimizer, closure: Callable[[], Any]) -> Any:
    """Take a step, with ``step(closure)`` only where an integrator needs several gradients, and return the loss.

    Args:
        optimizer: Any optimizer.
        closure: Clears the gradients, computes the loss, calls backward, returns the loss.

    Example:
        >>> model = torch.nn.Linear(3, 1)
        >>> optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        >>> def closure():
        ...     optimizer.zero_grad()
        ...     loss = model(torch.ones(3)).square().sum()
        ...     loss.backward()
        ...     return loss.item()
        >>> take_step(optimizer, closure) > closure()
        True
    """
    if isinstance(optimizer, LowRankOptimizer) and optimizer.integrator.gradients > 1:
        return optimizer.step(closure)
    loss = closure()
    optimizer.step()
    return loss
