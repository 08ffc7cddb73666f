"""One forward pass that leaves no trace: how a batch enters a model, and what is put back afterwards."""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import BaseTorchFunctionMode

Forward = Callable[[nn.Module, Any], Any]
Notice = Callable[[str, nn.Module, Tensor, Any], None]


def call(model: nn.Module, batch: Any) -> Any:
    """Return ``model(batch)``, with a mapping as keyword arguments and of a tuple or list the first entry alone.

    Loaders yield ``(inputs, targets)``, so the rest of a tuple is taken to be targets.

    Raises:
        TypeError: The batch is of another kind.

    Example:
        >>> x = torch.zeros(3, 2)
        >>> [call(nn.Linear(2, 4), batch).shape for batch in (x, (x, "targets"), {"input": x})]
        [torch.Size([3, 4]), torch.Size([3, 4]), torch.Size([3, 4])]
    """
    if isinstance(batch, Tensor):
        return model(batch)
    if isinstance(batch, Mapping):
        return model(**batch)
    if isinstance(batch, tuple | list) and batch:
        return model(batch[0])
    raise TypeError(
        f"a batch must be a tensor, a mapping, or a tuple or list that starts with the inputs, "
        f"got {type(batch).__name__}; pass forward=lambda model, batch: ..."
    )


@contextmanager
def evaluating(*models: nn.Module) -> Iterator[None]:
    """Put models into eval mode and turn gradients off; afterwards put back every training flag and the generators."""
    flags = [(module, module.training) for model in models for module in model.modules()]
    devices = sorted({p.get_device() for model in models for p in model.parameters() if p.is_cuda})
    with torch.no_grad(), torch.random.fork_rng(devices=devices):
        try:
            for model in models:
                model.eval()
            yield
        finally:
            for module, training in flags:
                module.training = training


def unfused() -> BaseTorchFunctionMode:
    """Return a context in which transformer layers of ``torch.nn`` call their parts instead of one fused kernel.

    The fused kernel steps aside for tensors that override functions. This mode overrides all of them by themselves.
    """
    return BaseTorchFunctionMode()


@contextmanager
def watching(modules: Mapping[str, nn.Module], notice: Notice) -> Iterator[None]:
    """Call ``notice(name, module, input, output)`` after every call of the modules, with the first tensor they got.

    Raises:
        TypeError: A module was called without a tensor.
    """

    def hook(name: str) -> Callable[..., None]:
        def note(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
            x = next((value for value in (*args, *kwargs.values()) if isinstance(value, Tensor)), None)
            if x is None:
                raise TypeError(f"{name}: {type(module).__name__} must be called with a tensor, got none.")
            notice(name, module, x, output)

        return note

    handles = []
    try:
        for name, module in modules.items():
            handles.append(module.register_forward_hook(hook(name), with_kwargs=True))
        yield
    finally:
        for handle in handles:
            handle.remove()
