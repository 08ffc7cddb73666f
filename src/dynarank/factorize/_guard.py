"""An optimizer that still holds a replaced parameter would train nothing; its next step says so instead."""

import weakref
from collections.abc import Iterable
from typing import Any

import torch
from torch import nn
from torch.optim.optimizer import Optimizer, register_optimizer_step_pre_hook
from torch.utils.weak import WeakIdKeyDictionary

# Tensors compare elementwise, so weak keys must go by identity. An attribute would stop the old layer from pickling.
_replaced = WeakIdKeyDictionary()
_checked: "weakref.WeakSet[Optimizer]" = weakref.WeakSet()
_handles: list[Any] = []


def watch(model: nn.Module, replaced: Iterable[tuple[nn.Parameter, str]], *, verb: str) -> None:
    """Make every optimizer that holds one of the replaced parameters raise at its next step.

    The hook is registered at the first call, once per process, and looks at each optimizer once.

    Args:
        model: The model that no longer uses the parameters.
        replaced: Parameters and what each was, such as ``"the dense weight of 'fc1'"``.
        verb: The function that replaced them.
    """
    home = weakref.ref(model)
    for parameter, what in replaced:
        _replaced[parameter] = (home, what, verb)
    _checked.clear()
    if not _handles:
        _handles.append(register_optimizer_step_pre_hook(_check))


def _check(optimizer: Optimizer, args: Any, kwargs: Any) -> None:
    if torch.compiler.is_compiling() or optimizer in _checked:
        return
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            if parameter in _replaced:
                _complain(optimizer, parameter, *_replaced[parameter])
    _checked.add(optimizer)


def _complain(optimizer: Optimizer, parameter: Any, home: Any, what: str, verb: str) -> None:
    model = home()
    if model is None or any(parameter is used for used in model.parameters()):
        return  # the model is gone, or the caller put the old layer back
    kind = type(optimizer).__name__
    raise RuntimeError(
        f"this {kind} was built before {verb} and still holds {what}, which the model no longer uses. "
        f"Build the optimizer after {verb}."
    )
