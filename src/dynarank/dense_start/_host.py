"""Parameters that take each other's place in an optimizer that somebody else built."""

import inspect
import logging
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any

from torch import Tensor, nn
from torch.optim import Optimizer

from dynarank.factorize._select import shortened
from dynarank.layers.base import AbstractLowRankLayer
from dynarank.optim.low_rank_optimizer import LowRankOptimizer
from dynarank.ranks.fixed import Fixed

State = dict[str, Any]
logger = logging.getLogger("dynarank")

# What torch's optimizers keep in the shape of a parameter, by what it is an average of. The `grad_avg` of centred
# RMSprop is neither: carried along like this, its square may exceed what `square_avg` becomes, and that is a NaN.
GRADIENTS = ("exp_avg", "momentum_buffer")
SQUARES = ("exp_avg_sq", "max_exp_avg_sq", "square_avg", "acc_delta", "sum")


def check_host(optimizer: object) -> None:
    """Raise unless parameters of the optimizer can take each other's place.

    Raises:
        TypeError: It is no optimizer.
        ValueError: Its ``step`` needs a closure, so that its state is of all parameters together.
    """
    if not isinstance(optimizer, Optimizer):
        raise TypeError(f"optimizer must be a torch.optim.Optimizer, got {type(optimizer).__name__}.")
    closure = inspect.signature(type(optimizer).step).parameters.get("closure")
    if closure is not None and closure.default is closure.empty:
        raise ValueError(
            f"{type(optimizer).__name__} keeps one state for all parameters together, so none of them can be replaced. "
            "Choose an optimizer that works with one gradient a step, such as torch.optim.AdamW or torch.optim.SGD."
        )


def holder(optimizer: Optimizer, parameter: Tensor) -> dict[str, Any] | None:
    """Return the group that holds a parameter, or None."""
    groups = optimizer.param_groups
    return next((group for group in groups if any(p is parameter for p in group["params"])), None)


def exchange(optimizer: Optimizer, old: nn.Parameter, new: Mapping[str, nn.Parameter], states: Sequence[State]) -> None:
    """Put parameters in the place of another, in the same group, each with a state.

    Args:
        optimizer: Whatever holds ``old``.
        old: The parameter that goes; its state goes with it.
        new: By name those that come; none may be in the optimizer yet, except ``old`` itself.
        states: A state for each; an empty one is filled as the optimizer fills that of a new parameter.
    """
    group = holder(optimizer, old)
    assert group is not None
    filled = [state or first_state(optimizer, group, p) for p, state in zip(new.values(), states, strict=True)]
    place = next(i for i, p in enumerate(group["params"]) if p is old)
    group["params"][place : place + 1] = new.values()
    if "param_names" in group:
        group["param_names"][place : place + 1] = new
    optimizer.state.pop(old, None)
    optimizer.state.update({p: state for p, state in zip(new.values(), filled, strict=True) if state})


def leave(optimizer: Optimizer, parameter: nn.Parameter) -> None:
    """Take a parameter out of an optimizer, and its state with it."""
    exchange(optimizer, parameter, {}, [])


def join(optimizer: LowRankOptimizer, old: nn.Parameter, layer: AbstractLowRankLayer) -> None:
    """Let an optimizer drive a low-rank layer in the place of a dense weight."""
    leave(optimizer, old)
    optimizer.add_param_group({"params": [layer.A, layer.B]})


def note_frozen(optimizer: Optimizer, names: Collection[str], *, step: int) -> bool:
    """Say that ranks froze before layers came whose ranks could change; return whether that was said."""
    if not names or not isinstance(optimizer, LowRankOptimizer) or not optimizer.frozen:
        return False
    policy = optimizer.rank_policy
    if policy == Fixed():
        return False
    logger.warning(
        "step %d: the ranks of %s are frozen from the start, since the optimizer held its last rank event before: %s "
        "never sees them. Let the schedule freeze after the switch, as Periodic(freeze=...) does with a later step, or "
        "give LowRankOptimizer rank_policy='fixed' if ranks are to stay.",
        step,
        shortened(list(names)),
        policy,
    )
    return True


def first_state(optimizer: Optimizer, group: Mapping[str, Any], parameter: nn.Parameter) -> State:
    """Return the state that the optimizer's constructor makes for a parameter; most make none before the first step."""
    known = inspect.signature(type(optimizer)).parameters
    options = {key: value for key, value in group.items() if key in known and key != "params"}
    try:
        return dict(type(optimizer)([parameter], **options).state.get(parameter, {}))
    except (TypeError, ValueError):
        return {}  # a constructor of its own kind: its state is made in the first step, as usual


def transported(
    state: Mapping[str, Any], old: Tensor, *, U: Tensor, V: Tensor, as_matrix: Callable[[Tensor], Tensor]
) -> State:
    """Return a state carried over to bases: averages of gradients ``U^T M V``, of squares ``(U*U)^T v (V*V)``.

    The second is what the average of ``(U^T G V)^2`` would be, were the entries of ``G`` independent and of mean zero;
    it is not negative. Counters and options stay.

    Args:
        state: That of the old parameter.
        old: The old parameter.
        U: Left basis ``(m, r)``, in what is the matrix of the old parameter.
        V: Right basis ``(n, r)``.
        as_matrix: Turns what has the shape of the old parameter into a matrix ``(m, n)``.

    Raises:
        ValueError: It holds another tensor than these.
    """
    sides = dict.fromkeys(GRADIENTS, (U, V)) | dict.fromkeys(SQUARES, (U.square(), V.square()))
    found: State = {}
    for name, value in state.items():
        if not isinstance(value, Tensor) or value.dim() == 0:
            found[name] = value
        elif name in sides and value.shape == old.shape:
            left, right = sides[name]
            found[name] = (left.mT @ as_matrix(value).to(left) @ right).to(value).contiguous()
        else:
            raise ValueError(
                f"what {name!r} in the optimizer's state becomes under a change of bases is not known; known are "
                f"{', '.join(sides)}. Choose state='fresh'."
            )
    return found
