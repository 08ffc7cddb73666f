"""``DistributedDataParallel`` around parameters that change their shape: its reducer is let go and built again."""

import gc
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from dynarank.layers._factored import AbstractFactoredLayer
from dynarank.layers._resize import refusal

# Private to torch, and what DistributedDataParallel itself calls when it is unpickled. A canary test watches them.
PRIVATE = (
    "_build_params_for_reducer",
    "_build_debug_param_to_name_mapping",
    "_check_reducer_finalized",
    "_comm_hooks",
    "_ddp_init_helper",
)


def unwrap(model: nn.Module) -> tuple[nn.Module, DistributedDataParallel | None]:
    """Return the module inside ``DistributedDataParallel`` and ``torch.compile``, and the former if there is one.

    Example:
        >>> model = nn.Linear(2, 2)
        >>> unwrap(model) == (model, None)
        True
    """
    wrapper = None
    while True:
        if isinstance(model, DistributedDataParallel):
            model, wrapper = model.module, model
        elif isinstance(inner := getattr(model, "_orig_mod", None), nn.Module):
            model = inner
        else:
            return model, wrapper


def check_wrapper(wrapper: DistributedDataParallel) -> None:
    """Raise where the wrapper cannot follow a change of shape.

    Raises:
        RuntimeError: torch has other internals than this was written for, or an option holds on to the parameters.
    """
    if missing := [name for name in PRIVATE if not hasattr(wrapper, name)]:
        raise RuntimeError(
            f"this version of torch has no DistributedDataParallel.{missing[0]}, which rebuilds the reducer after a "
            "change of rank. Use a tested version, or wrap the model again after each rank event yourself."
        )
    held = {
        "mixed_precision": wrapper.mixed_precision,
        "delay_all_reduce_named_params": wrapper._delay_all_reduce_params,
    }
    for option, value in held.items():
        if value:
            raise RuntimeError(
                f"DistributedDataParallel({option}=...) keeps hold of parameters that change their shape. "
                "Leave it out; torch.autocast gives mixed precision."
            )


@contextmanager
def rebuilding(wrapper: DistributedDataParallel | None) -> Iterator[None]:
    """Let go of the reducer while parameters change their shape or are replaced, and build it again afterwards.

    Every process must do this at the same step. All options and communication hooks stay; what a stateful hook
    remembers per bucket does not fit the new buckets.

    Args:
        wrapper: The wrapper, or None to do nothing.
    """
    if wrapper is None:
        yield
        return
    check_wrapper(wrapper)
    unset: Any = None
    wrapper.reducer = wrapper.logger = unset  # the last references: its hooks leave the parameters with it
    try:
        yield
    finally:
        _build_reducer(wrapper)


def _build_reducer(wrapper: DistributedDataParallel) -> None:
    """Do what the constructor of the wrapper does after it has compared the shapes."""
    named = wrapper.module.named_parameters()
    wrapper._module_parameters = [p for name, p in named if name not in wrapper.parameters_to_ignore]
    parameters, sparse = wrapper._build_params_for_reducer()
    names = wrapper._build_debug_param_to_name_mapping(parameters)
    wrapper._ddp_init_helper(parameters, sparse, names, wrapper.static_graph)
    wrapper._has_rebuilt_buckets = False
    if wrapper.static_graph:
        wrapper._static_graph_delay_allreduce_enqueued = False
        wrapper.reducer._set_static_graph()
        wrapper.logger._set_static_graph()  # type: ignore[union-attr]
    for hook, state in wrapper._comm_hooks:
        dist._register_comm_hook(wrapper.reducer, state, hook)  # type: ignore[attr-defined]


def pending(wrapper: DistributedDataParallel) -> str | None:
    """Return that a forward pass has not been run backward yet, or None.

    The reducer refers to each of its parameters equally often; a graph that was not run refers to some once more.
    Without its reducer such a graph would run backward with nobody averaging its gradients.

    Raises:
        RuntimeError: From torch: the last backward pass left parameters out, so their gradients were not averaged.
    """
    wrapper._check_reducer_finalized()
    ignored = wrapper.parameters_to_ignore
    held = [p for name, p in wrapper.module.named_parameters() if p.requires_grad and name not in ignored]
    counts = [p._use_count() for p in held]  # type: ignore[attr-defined]
    return "a forward pass was kept and not run backward" if max(counts) > min(counts) else None


def held(layers: Mapping[str, AbstractFactoredLayer]) -> str | None:
    """Return the first layer whose factors something else holds on to, with what is known about it, or None."""
    if _held(layers) is None:
        return None
    gc.collect()  # a cycle of dead objects may be all there is
    return _held(layers)


def _held(layers: Mapping[str, AbstractFactoredLayer]) -> str | None:
    for name, layer in layers.items():
        for factor in (layer._parameters.get(name) for name in layer.factor_names):
            if factor is not None and (reason := refusal(factor)) is not None:
                return f"{name}: {reason}"
    return None
