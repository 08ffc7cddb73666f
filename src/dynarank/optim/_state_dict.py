"""What the saved state of an optimizer must fit, checked before anything is changed, and how it is taken over."""

from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from dynarank.layers._factored import AbstractFactoredLayer
from dynarank.optim._layer_state import fresh, shapes, stored

if TYPE_CHECKING:
    from dynarank.optim.low_rank_optimizer import LowRankOptimizer

MODEL_FIRST = "Load the model's checkpoint before the optimizer's: the state has the shape of its ranks."


def check_saved(optimizer: "LowRankOptimizer", saved: Mapping[str, Any]) -> None:
    """Raise unless ``saved`` fits the optimizer and its model as they are.

    Raises:
        ValueError: It is the state of another optimizer, or belongs to other ranks or parameters.
    """
    if "low_rank" not in saved:
        raise ValueError("load_state_dict needs the state of a LowRankOptimizer, got one without 'low_rank'.")
    _check_origin(optimizer, saved["low_rank"])
    _check_groups(optimizer, saved)
    for index, name, layer in _low_rank_entries(optimizer):
        _check_layer(optimizer, name, layer, saved["state"].get(index))
    if type(optimizer.base).__module__.startswith("torch.optim"):
        _check_base_state(optimizer, saved)


def restore_as_saved(optimizer: "LowRankOptimizer", saved: Mapping[str, Any]) -> None:
    """Set the states of the low-rank layers as they were saved; torch casts them to the dtype of the parameter."""
    for index, _, layer in _low_rank_entries(optimizer):
        parameter = stored(layer)[0]
        if index in saved["state"]:
            optimizer.state[parameter] = {k: _copy(v, parameter) for k, v in saved["state"][index].items()}


def _copy(value: Tensor, parameter: Tensor) -> Tensor:
    """Counters, of no dimension, stay on the CPU, where reading them is free."""
    return value.clone() if value.dim() == 0 else value.to(parameter.device, copy=True)


def _low_rank_entries(optimizer: "LowRankOptimizer") -> Iterator[tuple[int, str, AbstractFactoredLayer]]:
    """Yield where each layer's state stands in a state dict: torch numbers the parameters through the groups."""
    index = 0
    for name, layer in optimizer.layers.items():
        yield index, name, layer
        index += len(stored(layer))


def _check_origin(optimizer: "LowRankOptimizer", own: Mapping[str, Any]) -> None:
    kind = type(optimizer.integrator).__name__
    if own["integrator"] != kind:
        raise ValueError(f"the saved state is of the integrator {own['integrator']}, but this optimizer uses {kind}.")
    found, needed = [_unwrapped(name) for name in own["layers"]], [_unwrapped(name) for name in optimizer.layers]
    if found != needed:
        raise ValueError(
            f"the saved state is of the low-rank layers {found}, but the optimizer drives {needed}. "
            "Factorise the same layers, and add them to the optimizer in the same order."
        )


def _unwrapped(name: str) -> str:
    """Return a layer's name without what wrapping or compiling the model puts into it."""
    return name.replace("_orig_mod.", "").removeprefix("module.")


def _check_groups(optimizer: "LowRankOptimizer", saved: Mapping[str, Any]) -> None:
    found = [len(group["params"]) for group in saved["param_groups"]]
    needed = [len(group["params"]) for group in optimizer.param_groups]
    if found != needed:
        hint = MODEL_FIRST if found[1:] == needed[1:] else "Add the same parameter groups first."
        raise ValueError(f"the saved state has groups of {found} parameters, but the optimizer of {needed}. {hint}")


def _check_layer(
    optimizer: "LowRankOptimizer", name: str, layer: AbstractFactoredLayer, kept: Mapping[str, Tensor] | None
) -> None:
    """What a cycle keeps besides, such as counters, is not known here and may be there or not."""
    if kept is None:
        return
    needed = shapes(fresh(optimizer.integrator, layer))
    found = {key: shape for key, shape in shapes(kept).items() if key in needed}
    if found != needed:
        raise ValueError(
            f"{name}: the saved state has shapes {shapes(kept)}, but rank {layer.rank} in {stored(layer)[0].dtype} "
            f"needs {needed}. {MODEL_FIRST}"
        )


def _check_base_state(optimizer: "LowRankOptimizer", saved: Mapping[str, Any]) -> None:
    """Torch's own optimizers keep tensors that broadcast to the parameter; fused steps do not check it."""
    names = {id(p): name for name, p in optimizer.model.named_parameters()}
    index = len(optimizer.param_groups[0]["params"])
    for parameter in (p for group in optimizer.param_groups[1:] for p in group["params"]):
        for key, value in saved["state"].get(index, {}).items():
            if isinstance(value, Tensor) and not _broadcasts(value.shape, parameter.shape):
                raise ValueError(
                    f"{names.get(id(parameter), f'parameter {index}')}: the saved {key} has shape "
                    f"{tuple(value.shape)}, the parameter {tuple(parameter.shape)}. Load the state of the same model."
                )
        index += 1


def _broadcasts(shape: torch.Size, target: torch.Size) -> bool:
    return len(shape) <= len(target) and all(
        a in (1, b) for a, b in zip(reversed(shape), reversed(target), strict=False)
    )
