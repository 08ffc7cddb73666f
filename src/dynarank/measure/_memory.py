"""Bytes: what a model stores, and the most that is alive at once while it computes."""

from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from dynarank.measure._forward import Forward, call, evaluating
from dynarank.measure._ledger import Ledger


def stored_bytes(model: nn.Module) -> int:
    """Return the bytes of all parameters and persistent buffers; what shares its storage counts once.

    Of a parameter that is a part of a larger storage only the part counts.

    Example:
        >>> tied = nn.ModuleList([nn.Linear(5, 7, bias=False), nn.Linear(5, 7, bias=False)])
        >>> tied[1].weight = tied[0].weight
        >>> stored_bytes(tied)
        140
    """
    return _count_bytes(_persistent(model))


def peak_memory(model: nn.Module, batch: Any, *, forward: Forward = call) -> int:
    """Return the largest number of bytes alive at once in one forward pass in inference.

    Parameters, buffers, activations and the output count; the batch does not. On the CPU every tensor counts from the
    operator that makes it until it is freed, but not what a kernel allocates for itself. On CUDA it is the peak of
    torch's allocator, whose statistics are reset.

    Args:
        model: The model; training flags are put back.
        batch: What ``forward`` takes.
        forward: How a batch enters the model.

    Example:
        >>> net = nn.Sequential(nn.Linear(8, 100, bias=False), nn.Linear(100, 8, bias=False))
        >>> peak_memory(net, torch.zeros(2, 8))  # both weights, the hidden and the output activation
        7264
    """
    held = _count_bytes((*model.parameters(), *model.buffers()))
    tensors = (leaf for leaf in tree_leaves(batch) if isinstance(leaf, Tensor))
    devices = {t.device for t in (*model.parameters(), *model.buffers(), *tensors) if t.is_cuda}
    with evaluating(model):
        if devices:
            return held + _cuda_peak(model, batch, forward, devices)
        with Ledger() as ledger:
            forward(model, batch)
    return held + ledger.peak


def _persistent(model: nn.Module) -> Iterator[Tensor]:
    yield from model.parameters()
    for module in model.modules():
        for name, buffer in module._buffers.items():
            if buffer is not None and name not in module._non_persistent_buffers_set:
                yield buffer


def _count_bytes(tensors: Iterable[Tensor]) -> int:
    """Return the bytes of the tensors, with every part of a storage counted once."""
    parts: dict[int, dict[Any, int]] = {}
    whole: dict[int, int] = {}
    for tensor in list(tensors):
        storage = tensor.untyped_storage()
        whole[storage._cdata] = storage.nbytes()
        part = (tensor.storage_offset(), tensor.shape, tensor.stride())
        parts.setdefault(storage._cdata, {})[part] = tensor.numel() * tensor.element_size()
    return sum(min(whole[key], sum(sizes.values())) for key, sizes in parts.items())


def _cuda_peak(model: nn.Module, batch: Any, forward: Forward, devices: set[torch.device]) -> int:
    forward(model, batch)  # the first products on a device also allocate workspaces, which stay
    before = {}
    for device in devices:
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        before[device] = torch.cuda.memory_allocated(device)
    forward(model, batch)
    return sum(torch.cuda.max_memory_allocated(device) - before[device] for device in devices)
