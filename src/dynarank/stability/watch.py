"""Looks at the weights of a model in any training loop, and the record of what they find."""

from collections.abc import Mapping
from math import prod
from typing import Any, Protocol, final

import torch
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd

from dynarank import factors
from dynarank.factors import FactorPair
from dynarank.layers._factored import AbstractFactoredLayer
from dynarank.stability.look import LayerLook, compare
from dynarank.stability.measures import TOP, Directions, directions, resolved


class Recorder(Protocol):
    """What takes down looks: `dynarank.History` does."""

    def look(self, *, step: int, layers: Mapping[str, Any], lr: float | None) -> None:
        """Record a look."""


@final
class WeightWatch:
    """Looks at the weights of a model now and then, dense or low-rank, and records how they have moved.

    Watched are ``nn.Linear``, convolutions as ``(out, in * kernel)`` matrices (transposed ones as their weight is
    stored, ``in`` first) and low-rank layers; not what else holds matrices, such as the joint projection of
    ``nn.MultiheadAttention``. A layer is followed by its name, and the weight as a matrix is what counts: it may
    change its form or its rank between looks.

    A look takes one SVD of every dense weight, which goes with ``m n min(m, n)`` and is what it costs: for LeNet5 as
    much as 1.4 steps of 128 images (experiments/stability.py). For low-rank layers it is the SVD of their factors. Kept
    until the next look are ``r (m + n + 1)`` numbers a layer with ``r`` directions. The model is only read. Call it
    every few hundred steps or once an epoch: measures of two looks grow with the steps in between, so keep that
    distance.

    Args:
        model: The model itself, not a wrapper such as DistributedDataParallel: names are taken from it.
        history: Where each look is recorded; None to use what `look` returns.
        top: Leading directions whose overlap is measured.

    Raises:
        ValueError: The model holds no such layer, or ``top`` is below 1.

    Example:
        >>> _ = torch.manual_seed(0)
        >>> model = nn.Sequential(nn.Linear(8, 6), nn.ReLU(), nn.Linear(6, 3))
        >>> watch = WeightWatch(model)
        >>> _ = watch.look(0)
        >>> _ = model[0].weight.data.mul_(1.1)
        >>> found = watch.look(10)["0"]
        >>> found.stability, found.overlap, round(found.change, 6), found.rank, found.break_even
        (1.0, 1.0, 0.1, 6, 3)
    """

    def __init__(self, model: nn.Module, history: Recorder | None = None, *, top: int = TOP) -> None:
        if top < 1:
            raise ValueError(f"WeightWatch: top must be at least 1, got {top}.")
        if not _watched(model):
            raise ValueError(
                f"WeightWatch: {type(model).__name__} holds no layer to watch. Watched are nn.Linear, convolutions and "
                "low-rank layers."
            )
        self.model = model
        self.history = history
        self.top = top
        self._before: dict[str, Directions] = {}

    @torch.no_grad()
    def look(self, step: int, *, lr: float | None = None) -> dict[str, LayerLook]:
        """Return, and record where there is a history, how every layer stands after ``step`` optimizer steps.

        Args:
            step: Number of optimizer steps taken.
            lr: Learning rate, to be seen beside the measures.

        Raises:
            ValueError: A weight holds NaN or infinity; the message names its layer. Nothing is recorded.
        """
        now = {name: _directions_of(name, module, step=step) for name, module in _watched(self.model).items()}
        layers = {name: compare(_moved(self._before.get(name), at), at, top=self.top) for name, at in now.items()}
        self._before = now
        if self.history is not None:
            self.history.look(step=step, layers=layers, lr=lr)
        return layers

    def state_dict(self) -> dict[str, Any]:
        """Return what the next look compares with: a checkpoint that holds it goes on with the very same looks."""
        return {name: {"U": at.U, "sigma": at.sigma, "V": at.V} for name, at in self._before.items()}

    def load_state_dict(self, state: Mapping[str, Mapping[str, Tensor]]) -> None:
        """Take over what `state_dict` returned."""
        self._before = {name: Directions(at["U"], at["sigma"], at["V"]) for name, at in state.items()}


def _watched(model: nn.Module) -> dict[str, Any]:
    """Return the layers whose weights are matrices by now, each once, under its first qualified name."""
    kinds = (nn.Linear, _ConvNd, AbstractFactoredLayer)
    found = {name: module for name, module in model.named_modules() if isinstance(module, kinds)}
    return {name: module for name, module in found.items() if not any(map(nn.parameter.is_lazy, module.parameters()))}


def _directions_of(name: str, module: Any, *, step: int) -> Directions:
    try:
        return _factored_directions(module) or directions(module.weight)
    except ValueError as error:
        raise ValueError(
            f"WeightWatch: the weight of {name or type(module).__name__} cannot be looked at after step {step}: {error}"
        ) from None


def _factored_directions(module: Any) -> Directions | None:
    """Return the directions of a low-rank layer from its factors; None where they are not of the matrix looked at."""
    if not isinstance(module, AbstractFactoredLayer):
        return None
    shape = tuple(module.weight_shape)  # type: ignore[attr-defined]
    if module.matrix_shape != (shape[0], prod(shape[1:])):
        return None
    point = module.point()
    at = factors.read_pair(point) if isinstance(point, FactorPair) else factors.diagonalise(point)
    return resolved(at.U, at.sigma, at.V)


def _moved(before: Directions | None, after: Directions) -> Directions | None:
    return None if before is None else before.like(after)
