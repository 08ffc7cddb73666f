"""Steps that take several gradients: the closure runs again with the layers standing at other points."""

from collections.abc import Callable, Iterable, Mapping
from contextlib import ExitStack
from typing import Any, cast

import torch
from torch import Tensor

from dynarank.factors import FactorPair
from dynarank.integrators.base import AbstractIntegrator, Point, Stages, State
from dynarank.layers._factored import AbstractFactoredLayer
from dynarank.layers._visit import visiting


def follow(
    ways: Mapping[str, Stages], gradients_at: Callable[[Mapping[str, Point]], Mapping[str, FactorPair | Tensor] | None]
) -> dict[str, tuple[Point, State]] | None:
    """Return the points and states where all layers go, or None if gradients on the way are refused.

    Layers that want another gradient at the same stage get it together.

    Args:
        ways: The stages of every layer, not begun.
        gradients_at: Gives the gradients of what the points store, or None.
    """
    ends: dict[str, tuple[Point, State]] = {}
    gradients: Any = dict.fromkeys(ways)
    while gradients is not None:
        wanted: dict[str, Point] = {}
        for name, gradient in gradients.items():
            try:
                wanted[name] = ways[name].send(gradient)  # None starts it
            except StopIteration as end:
                ends[name] = end.value
        if not wanted:
            return ends
        gradients = gradients_at(wanted)
    return None


def check_closure(
    integrator: AbstractIntegrator,
    closure: Callable[[], Any] | None,
    groups: Iterable[Mapping[str, Any]],
    *,
    processes: int,
) -> None:
    """Raise where an integrator that takes several gradients cannot get them.

    Raises:
        RuntimeError: There is no closure, gradients were accumulated before it, or there are several processes.
    """
    name, alternative = type(integrator).__name__, "or use an integrator with one gradient, such as parallel_bug"
    if closure is None:
        raise RuntimeError(
            f"{name} takes {integrator.gradients} gradients a step: call optimizer.step(closure) with a function that "
            "clears the gradients, computes the loss, calls backward and returns the loss. GradScaler and trainers "
            f"that pass no closure, such as transformers.Trainer, cannot do that; {alternative}."
        )
    if processes > 1:
        raise RuntimeError(
            f"{name} takes gradients at points between two steps, which DistributedDataParallel does not average "
            f"over {processes} processes. Train on one, {alternative}."
        )
    parameters = (p for group in groups for p in group["params"])
    if any(p.grad is not None and bool(p.grad.any()) for p in parameters):
        raise RuntimeError(
            f"{name} found gradients from before the closure, which its later evaluations would not see. Accumulate "
            f"inside the closure, and leave out backward() before optimizer.step(closure), {alternative}."
        )


def gradients_at(
    points: Mapping[str, Point], layers: Mapping[str, AbstractFactoredLayer], closure: Callable[[], Any]
) -> dict[str, FactorPair | Tensor]:
    """Return the gradients of what some points store: the closure runs with the layers standing there.

    Raises:
        RuntimeError: The closure left a layer out that took part before.
    """
    with ExitStack() as stack:
        for name, point in points.items():
            stack.enter_context(visiting(cast(Any, layers[name]), point))
        with torch.enable_grad():
            closure()
        found = {name: layers[name].point_gradient() for name in points}
    if missing := [name for name, gradient in found.items() if gradient is None]:
        raise RuntimeError(
            f"{missing[0]} had a gradient when the closure ran first and has none now. It must compute the same loss."
        )
    return found  # type: ignore[return-value]


def nonfinite_layer(gradients: Mapping[str, FactorPair | Tensor]) -> str | None:
    """Return the first layer whose gradient holds NaN or infinity, or None."""
    for name, gradient in gradients.items():
        parts = (gradient.A, gradient.B) if isinstance(gradient, FactorPair) else (gradient,)
        if not all(bool(part.isfinite().all()) for part in parts):
            return name
    return None
