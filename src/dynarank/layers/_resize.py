"""Changing the shape of parameters that autograd, an optimizer and the user already hold."""

import weakref
from collections.abc import Sequence

import torch
from torch import Tensor, nn


def refusal(parameter: nn.Parameter) -> str | None:
    """Return why ``parameter`` cannot change its shape now, or None. Reads only: a swap undone poisons live graphs."""
    if weakref.getweakrefs(parameter):
        return "something, such as a compile backend of your own, holds a weak reference to the parameter"
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


def woken(
    resting: Sequence[nn.Parameter] | None, shapes: Sequence[tuple[int, ...]], *, like: nn.Parameter
) -> Sequence[nn.Parameter]:
    """Return parameters of these shapes: those that rested, with their identity and hooks, or new ones of zeros.

    Args:
        resting: Parameters that the module did not use for a while, or None.
        shapes: The shapes they must have now.
        like: Gives the kind; what rests in another dtype or on another device, or cannot change its shape, is let go.
    """
    if resting is not None and all((p.dtype, p.device) == (like.dtype, like.device) for p in resting):
        pairs = list(zip(resting, shapes, strict=True))
        if not any(refusal(p) for p, shape in pairs if p.shape != shape):
            for parameter, shape in pairs:
                parameter.requires_grad_(like.requires_grad)
                if parameter.shape != shape:
                    resize_(parameter, shape)
            return resting
    return [nn.Parameter(like.new_zeros(shape), requires_grad=like.requires_grad) for shape in shapes]


def rows_in_use(A: Tensor, B: Tensor) -> int:
    """Return the rank held by two factors: the last row that is not zero in either (at least 1)."""
    if A.is_meta:
        return A.shape[0]
    used = (A != 0).any(dim=1) | (B != 0).any(dim=1)
    return max(1, int(torch.where(used, torch.arange(1, len(used) + 1, device=used.device), 0).max()))


def is_start_of(one: Tensor, other: Tensor | None) -> bool:
    """Whether one is the leading rows of the other, in the same memory."""
    if other is None or one.data_ptr() != other.data_ptr() or one.dtype != other.dtype:
        return False
    return share_memory(one, other) and one.stride() == other.stride() and one.shape[1:] == other.shape[1:]


def share_memory(one: Tensor, other: Tensor | None) -> bool:
    """Whether writing to one changes the other."""
    return other is not None and one.untyped_storage()._cdata == other.untyped_storage()._cdata
