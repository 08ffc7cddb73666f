"""Checks of the gradients before a step: finite everywhere, and complete for each layer."""

import logging
from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from dynarank.errors import NonFiniteGradientError
from dynarank.layers._factored import AbstractFactoredLayer
from dynarank.optim._layer_state import stored

logger = logging.getLogger("dynarank")


def takes_part(name: str, layer: AbstractFactoredLayer) -> bool:
    """Whether a layer is trainable and has gradients.

    Raises:
        RuntimeError: Only one of its factors is trainable, or has a gradient.
    """
    factors = stored(layer)
    trainable, present = [p.requires_grad for p in factors], [p.grad is not None for p in factors]
    if any(trainable) and not all(trainable):
        raise RuntimeError(
            f"{name}: one of {_names(layer)} is frozen and another is not, but they move together. "
            "Call requires_grad_ on the layer, not on a factor."
        )
    if all(trainable) and any(present) and not all(present):
        raise RuntimeError(f"{name}: one of {_names(layer)} has a gradient and another has none. Clear all or none.")
    return all(trainable) and all(present)


def _names(layer: AbstractFactoredLayer) -> str:
    *names, last = (name for name in layer.factor_names if layer._parameters.get(name) is not None)
    return f"{', '.join(names)} and {last}"


def find_nonfinite(model: nn.Module, groups: Iterable[dict[str, Any]]) -> str | None:
    """Return the name of a parameter whose gradient holds NaN or infinity, or None: one reduction if all is well."""
    owners = [p for group in groups for p in group["params"] if p.grad is not None]
    if not owners or bool(torch.isfinite(torch.nn.utils.get_total_norm(_entries(owners)))):
        return None
    # A norm may overflow where no gradient does.
    guilty = {id(p) for p, entries in zip(owners, _entries(owners), strict=True) if not _finite(entries)}
    names = (name for name, p in model.named_parameters() if id(p) in guilty)
    return next(names, "a parameter outside the model") if guilty else None


def accepts(guilty: str | None, steps: int, *, nonfinite: str) -> bool:
    """Whether a step may be taken: no gradient is guilty of NaN or infinity.

    Raises:
        NonFiniteGradientError: One is, and ``nonfinite`` is ``"raise"``.
    """
    if guilty is None:
        return True
    if nonfinite == "skip":
        logger.warning("%s: gradient is not finite at step %d; the step was skipped.", guilty, steps + 1)
        return False
    raise NonFiniteGradientError(
        f"{guilty}: gradient is not finite at step {steps + 1}. Everything was left as after step {steps}. "
        "Look at the data and the learning rate, or pass nonfinite='skip'."
    )


def _entries(parameters: Iterable[Tensor]) -> Iterator[Tensor]:
    """Yield the gradients, and only the stored entries of sparse ones."""
    for parameter in parameters:
        gradient = parameter.grad
        assert gradient is not None
        yield gradient._values() if gradient.is_sparse else gradient


def _finite(tensor: Tensor) -> bool:
    return bool(torch.isfinite(tensor).all())
