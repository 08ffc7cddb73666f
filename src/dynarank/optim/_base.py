"""What is asked of the base optimizer, which drives everything that is not a factor of a low-rank layer."""

from collections.abc import Iterable
from typing import Any

from torch.optim import Optimizer


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
