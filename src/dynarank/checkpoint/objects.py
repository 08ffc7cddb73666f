"""What a checkpoint can hold: things with a state dict, generators, and plain values; how each is read and set."""

from typing import Any

import torch
from torch import Tensor, nn

from dynarank.checkpoint.tree import flatten, unflatten

STATEFUL, GENERATOR, VALUE = "stateful", "generator", "value"
KINDS = (STATEFUL, GENERATOR, VALUE)
GLOBAL_GENERATORS = "global_generators"  # an argument of save, so that no object can have this name


def kind_of(thing: Any) -> str:
    """Return how a thing is stored: by its state dict, by its generator state, or as the value that it is.

    Example:
        >>> kind_of(nn.Linear(1, 1)), kind_of(torch.Generator()), kind_of({"lr": 0.1})
        ('stateful', 'generator', 'value')
    """
    if isinstance(thing, torch.Generator):
        return GENERATOR
    has_state = callable(getattr(thing, "state_dict", None)) and callable(getattr(thing, "load_state_dict", None))
    return STATEFUL if has_state and not isinstance(thing, type) else VALUE


def state_of(thing: Any) -> Any:
    """Return the state of a thing; tensors in it may be the live ones."""
    kind = kind_of(thing)
    if kind == GENERATOR:
        return thing.get_state()
    return thing.state_dict() if kind == STATEFUL else thing


def set_state(thing: Any, state: Any) -> None:
    """Give a thing with a state dict, or a generator, the state that `state_of` returned."""
    if isinstance(thing, torch.Generator):
        thing.set_state(state)
    else:
        thing.load_state_dict(state)


def order_of(thing: Any) -> int:
    """Return when a thing is loaded: modules, then what refers to their parameters, then generators.

    Setting the state of a module may draw random numbers, and an optimizer may look at its parameters.

    Example:
        >>> model = nn.Linear(1, 1)
        >>> things = [torch.Generator(), torch.optim.SGD(model.parameters()), model]
        >>> [type(thing).__name__ for thing in sorted(things, key=order_of)]
        ['Linear', 'SGD', 'Generator']
    """
    if isinstance(thing, nn.Module):
        return 0
    return 2 if kind_of(thing) == GENERATOR else 1


def snapshot(thing: Any, *, name: str) -> Any:
    """Return a copy of the state of a thing that later changes do not reach, its tensors on the CPU.

    Raises:
        TypeError: If the state holds something that a checkpoint cannot hold.

    Example:
        >>> model = nn.Linear(1, 1)
        >>> before = snapshot(model, name="model")
        >>> _ = nn.init.constant_(model.weight, 7.0)
        >>> bool(before["weight"] == 7.0)
        False
    """
    tree, tensors = flatten(state_of(thing), name=name)
    copies = {key: tensor.detach().to("cpu", copy=True) for key, tensor in tensors.items()}
    return unflatten(tree, tensor=copies.__getitem__)


def global_states() -> dict[str, Any]:
    """Return the states of torch's global generators: the CPU's, and those of CUDA if it is in use.

    Example:
        >>> sorted(global_states())[0]
        'cpu'
    """
    states: dict[str, Any] = {"cpu": torch.get_rng_state()}
    if torch.cuda.is_available() and torch.cuda.is_initialized():
        states["cuda"] = torch.cuda.get_rng_state_all()
    return states


def set_global_states(states: dict[str, Any]) -> None:
    """Set the states of torch's global generators.

    Raises:
        ValueError: If the states are of another number of CUDA devices than there is.
    """
    cuda: list[Tensor] = states.get("cuda", [])
    if cuda and len(cuda) != torch.cuda.device_count():
        raise ValueError(
            f"the checkpoint holds the generators of {len(cuda)} CUDA devices, this machine has "
            f"{torch.cuda.device_count()}. Pass ignore=('global_generators',) to go on without them."
        )
    torch.set_rng_state(states["cpu"])
    if cuda:
        torch.cuda.set_rng_state_all(cuda)
