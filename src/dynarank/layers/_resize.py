"""Changing the shape of a parameter that autograd, an optimizer and the user already hold."""

import weakref

import torch
from torch import nn


def refusal(parameter: nn.Parameter) -> str | None:
    """Return why ``parameter`` cannot change its shape now, or None. Reads only: a swap undone poisons live graphs."""
    if weakref.getweakrefs(parameter):
        return "something holds a weak reference to the parameter"
    # One count is the parameter itself; a second one is the gradient accumulator of a graph that has been run.
    count = parameter._use_count()  # type: ignore[attr-defined]
    if count > 2:
        return "a live graph, wrapper or kept activation still refers to the parameter"
    return None


def check_resizable(parameter: nn.Parameter, shape: tuple[int, ...]) -> None:
    """Raise if ``parameter`` cannot take ``shape`` now."""
    reason = refusal(parameter)
    if reason is not None:
        raise RuntimeError(
            f"a parameter of shape {tuple(parameter.shape)} cannot become {shape} now: {reason}. "
            "Delete old losses and outputs first, or change ranks within the capacity."
        )


def resize_(parameter: nn.Parameter, shape: tuple[int, ...]) -> None:
    """Give ``parameter`` a new shape filled with zeros, keeping its identity, attributes and hooks; drop its gradient.

    Raises:
        RuntimeError: Something else still refers to the parameter's old shape.
    """
    check_resizable(parameter, shape)
    parameter.grad = None
    kept = dict(parameter.__dict__)
    hooks, accumulate_hooks = parameter._backward_hooks, parameter._post_accumulate_grad_hooks  # type: ignore[attr-defined]
    fresh = nn.Parameter(parameter.new_zeros(shape), requires_grad=parameter.requires_grad)
    # swap_tensors, not .data: autograd holds the old shape while the caller's loss is alive.
    torch.utils.swap_tensors(parameter, fresh)
    vars(parameter).update(kept)
    parameter._backward_hooks = hooks
    parameter._post_accumulate_grad_hooks = accumulate_hooks  # type: ignore[attr-defined]
