"""What is asked of the base optimizer, which drives everything that is not a factor of a low-rank layer."""

import inspect
from collections.abc import Iterable
from typing import Any

from torch.optim import Optimizer


def check_base(base: object) -> type[Optimizer]:
    """Return ``base`` if it is the class of an optimizer that takes one gradient per step.

    Raises:
        TypeError: It is an instance, or no optimizer.
        ValueError: Its ``step`` needs a closure.
    """
    if isinstance(base, Optimizer):
        kind = type(base).__name__
        raise TypeError(
            f"base must be the class of an optimizer, got an instance of {kind}. Pass base={kind} and its options as "
            "base_options={...}; LowRankOptimizer builds it over the parameters that are not factors."
        )
    if not (isinstance(base, type) and issubclass(base, Optimizer)):
        raise TypeError(f"base must be the class of an optimizer such as torch.optim.AdamW, got {base!r}.")
    closure = inspect.signature(base.step).parameters.get("closure")
    if closure is not None and closure.default is closure.empty:
        raise ValueError(
            f"base={base.__name__} evaluates the loss several times in a step, but the factors move once per step. "
            "Choose a base optimizer that works with one gradient, such as torch.optim.AdamW or torch.optim.SGD."
        )
    return base


def drop_foreign_options(groups: Iterable[dict[str, Any]], base: Optimizer, options: dict[str, Any]) -> None:
    """Take out of groups of the base optimizer the options that torch filled in and only the factors have."""
    for group in groups:
        for name in options.keys() - base.defaults.keys():
            group.pop(name, None)


def follow_momentum(base: Optimizer) -> None:
    """Let ``beta1`` follow the ``momentum`` that a scheduler such as ``OneCycleLR`` wrote into the groups.

    Schedulers look at the defaults of the whole optimizer, which name ``momentum``, and write that key everywhere.
    """
    if "momentum" in base.defaults or "betas" not in base.defaults:
        return
    for group in base.param_groups:
        if "momentum" in group:
            group["betas"] = (group["momentum"], *group["betas"][1:])
