"""What the optimizer keeps for one layer: the integrator's state, and float32 masters of factors in half precision."""

from collections.abc import Mapping
from dataclasses import fields

import torch
from torch import Tensor, nn

from dynarank import linalg
from dynarank.factors import FactorPair, LowRankFactors
from dynarank.integrators.base import AbstractIntegrator, Point, State
from dynarank.layers._factored import AbstractFactoredLayer

MASTER = "master_"
HALF = (torch.bfloat16, torch.float16)


def stored(layer: AbstractFactoredLayer) -> list[nn.Parameter]:
    """Return the parameters that hold the layer's factors; its state is kept under the first."""
    parameters = layer._parameters  # not by attribute: that costs 1 us each, several times in every step
    return [p for name in layer.factor_names if (p := parameters.get(name)) is not None]


def pack(point: Point, state: State, *, dtype: torch.dtype) -> State:
    """Return what is kept for a layer of ``dtype``: the state and, in half precision, the point itself in float32."""
    kept = {key: value.contiguous() for key, value in state.items()}  # the layout decides the last bit of a product
    if dtype in HALF:
        kept |= {MASTER + field.name: linalg.widen(getattr(point, field.name)) for field in fields(point)}
    return kept


def unpack_state(kept: Mapping[str, Tensor]) -> State:
    """Return the integrator's part of what is kept."""
    return {key: value for key, value in kept.items() if not key.startswith(MASTER)}


def unpack_point(kept: Mapping[str, Tensor]) -> Point | None:
    """Return the point of the float32 masters, or None where there are none."""
    parts = {key.removeprefix(MASTER): value for key, value in kept.items() if key.startswith(MASTER)}
    if not parts:
        return None
    return FactorPair(**parts) if "A" in parts else LowRankFactors(**parts)


def fresh(integrator: AbstractIntegrator, layer: AbstractFactoredLayer) -> State:
    """Return what would be kept for a layer that starts where it is."""
    point = layer.point()
    return pack(point, integrator.init(point), dtype=stored(layer)[0].dtype)


def shapes(state: Mapping[str, Tensor]) -> dict[str, tuple[int, ...]]:
    """Return the shape of every tensor of a state."""
    return {key: tuple(value.shape) for key, value in state.items()}
