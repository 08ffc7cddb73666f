"""What the constructor of the optimizer accepts, checked at the door."""

import inspect
from collections.abc import Mapping
from typing import cast

from torch.optim import Optimizer

from dynarank._discovery import resolve
from dynarank.integrators.base import AbstractIntegrator
from dynarank.layers._factored import AbstractFactoredLayer
from dynarank.ranks.base import AbstractRankPolicy
from dynarank.ranks.noise_edge import NoiseEdge
from dynarank.schedules.base import AbstractSchedule
from dynarank.schedules.periodic import Periodic


def check_numbers(*, lr: float, momentum: float, weight_decay: float) -> None:
    """Raise unless step size, momentum and decay are in range."""
    if not lr >= 0 or not weight_decay >= 0:
        raise ValueError(f"lr and weight_decay must be at least 0, got {lr} and {weight_decay}.")
    if not 0 <= momentum < 1:
        raise ValueError(f"momentum must be at least 0 and below 1, got {momentum}.")


def choose_methods(
    integrator: str | AbstractIntegrator,
    rank_policy: str | AbstractRankPolicy | None,
    schedule: str | AbstractSchedule | None,
) -> tuple[AbstractIntegrator, AbstractRankPolicy, AbstractSchedule]:
    """Return the methods of these names, or the instances themselves; by default ranks stay."""
    found = (
        resolve("integrator", "dynarank.integrators", AbstractIntegrator, integrator),
        resolve("rank policy", "dynarank.ranks", AbstractRankPolicy, rank_policy or NoiseEdge()),
        resolve("schedule", "dynarank.schedules", AbstractSchedule, schedule or Periodic()),
    )
    return cast(tuple[AbstractIntegrator, AbstractRankPolicy, AbstractSchedule], found)


def check_forms(integrator: AbstractIntegrator, layers: Mapping[str, AbstractFactoredLayer]) -> None:
    """Raise if the integrator would take a layer to a form that the layer does not have.

    Raises:
        ValueError: It needs the core form, or gradients at points between two steps, and a layer has other modes.
    """
    bound = [name for name, layer in layers.items() if layer.mode_names]
    if bound and (integrator.core_form or integrator.gradients > 1):
        raise ValueError(
            f"{type(integrator).__name__} leaves the pair form on its way, which {', '.join(bound)} cannot do: it has "
            "ranks in several modes. Choose an integrator of one gradient in pair form, such as tangent_heavy_ball."
        )


def check_nonfinite(nonfinite: str) -> str:
    """Return what to do about gradients that are not finite, if it is known."""
    if nonfinite not in ("raise", "skip"):
        raise ValueError(f"nonfinite must be 'raise' or 'skip', got {nonfinite!r}.")
    return nonfinite


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
