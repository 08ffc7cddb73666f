"""State dicts and files: what a file holds of one, and a model that takes over what a file holds."""

import errno
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor, nn


def distinct(state: Mapping[str, Any]) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Return the tensors of a state dict as a file holds them, each once, and the other names of those that are shared.

    Raises:
        TypeError: An entry is no ordinary tensor with values.

    Example:
        >>> weight = torch.ones(2, 3)
        >>> tensors, shared = distinct({"embedding": weight, "head": weight})
        >>> list(tensors), shared
        (['embedding'], {'head': 'embedding'})
    """
    tensors: dict[str, Tensor] = {}
    shared: dict[str, str] = {}
    owners: dict[Any, str] = {}
    storages: set[int] = set()
    for name, value in state.items():
        _check_storable(name, value)
        view = (value.device, value.data_ptr(), value.dtype, tuple(value.shape), value.stride())
        owner = owners.setdefault(view, name) if value.numel() else name
        if owner != name:
            shared[name] = owner
            continue
        stored = value.detach().resolve_conj().cpu().contiguous()
        if stored.untyped_storage().data_ptr() in storages or stored.untyped_storage().nbytes() != stored.nbytes:
            stored = stored.clone()  # a part of another tensor, which safetensors would refuse
        storages.add(stored.untyped_storage().data_ptr())
        tensors[name] = stored
    return tensors, shared


def write_tensors(path: Path, tensors: Mapping[str, Tensor], **header: str) -> None:
    """Write a safetensors file with a few strings in its header.

    Raises:
        OSError: Writing fails.
    """
    try:
        save_file(dict(tensors), path, metadata={"format": "pt", **header})
    except SafetensorError as cause:
        raise OSError(errno.EIO, f"the model was not saved to {path.parent}: {cause}") from cause


def _check_storable(name: str, value: Any) -> None:
    kind = type(value).__name__
    if type(value) not in (Tensor, nn.Parameter):
        raise TypeError(f"{name}: a file cannot hold a {kind}. Convert it to an ordinary tensor, or leave it out.")
    if value.is_meta or value.layout != torch.strided:
        where = "on the meta device" if value.is_meta else f"of layout {value.layout}"
        raise TypeError(f"{name}: a file cannot hold a tensor {where}. Give it values as a dense tensor first.")


def check_fits(model: nn.Module, state: Mapping[str, Tensor]) -> None:
    """Check that ``state`` names every tensor of ``model`` and no other, in the same shapes.

    Raises:
        ValueError: It does not; nothing was changed.
    """
    own = {name: tensor for name, tensor in model.state_dict(keep_vars=True).items() if isinstance(tensor, Tensor)}
    faults = [f"{name} is not in the file" for name in own.keys() - state.keys()]
    faults += [f"{name} is only in the file" for name in state.keys() - own.keys()]
    first: dict[int, str] = {}
    for name in sorted(own.keys() & state.keys()):
        tensor, stored = own[name], state[name]
        other = first.setdefault(id(tensor), name)
        if not nn.parameter.is_lazy(tensor) and tensor.shape != stored.shape:
            faults.append(f"{name} has shape {tuple(stored.shape)} in the file and {tuple(tensor.shape)} in the model")
        elif stored is not state[other] and not torch.equal(stored, state[other]):
            faults.append(f"{name} and {other} are one tensor in the model and differ in the file")
    persistent = {id(tensor) for tensor in own.values()}
    for name, buffer in model.named_buffers():
        if buffer.is_meta and id(buffer) not in persistent:
            faults.append(f"{name} is on the meta device and, being no persistent buffer, not in the file")
    if faults:
        told = "; ".join(sorted(faults)[:5]) + ("; ..." if len(faults) > 5 else "")
        raise ValueError(f"the file does not fit the model: {told}. Pass the architecture that it was saved from.")


@torch.no_grad()
def fill_(model: nn.Module, state: Mapping[str, Tensor]) -> None:
    """Load a state dict that fits, with its dtypes; from the meta device to the CPU, tied as in the file."""
    fresh: dict[int, Any] = {}
    replaced = []  # keeps their ids from being given away
    for prefix, module in model.named_modules():
        for entries in (module._parameters, module._buffers):
            for key, tensor in entries.items():
                stored = state.get(f"{prefix}.{key}" if prefix else key)
                if tensor is None or stored is None or nn.parameter.is_lazy(tensor):
                    continue
                if tensor.is_meta:
                    new = fresh.get(id(tensor), fresh.get(id(stored)))
                    entries[key] = fresh[id(tensor)] = fresh[id(stored)] = (
                        _values_for(tensor, stored) if new is None else new
                    )
                    replaced.append(tensor)
                elif tensor.dtype != stored.dtype:
                    tensor.grad = None
                    tensor.data = tensor.data.to(stored.dtype)
    model.load_state_dict(dict(state))


def _values_for(tensor: Tensor, stored: Tensor) -> Any:
    values = torch.empty_like(tensor, device="cpu", dtype=stored.dtype)
    return nn.Parameter(values, tensor.requires_grad) if isinstance(tensor, nn.Parameter) else values
