"""Weights in files, looked at one tensor at a time: safetensors, whole or in shards, and what ``torch.save`` wrote."""

import json
import os
import pickle
import re
import struct
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from math import prod
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

HOMES = ("state_dict", "model_state_dict", "model", "module", "network", "net", "weights", "params")
NOT_WEIGHTS = ("optim", "sched")  # how the parts of a checkpoint are called that hold no weights of the model
OPTIMIZER = "optimizer/"  # how its tensors are called in a checkpoint of this library
FLOATING = {"F64": "float64", "F32": "float32", "F16": "float16", "BF16": "bfloat16"}
KINDS = "a .safetensors file, an index of shards, a folder of these, or what torch.save wrote of a state_dict"
BROKEN = (pickle.UnpicklingError, RuntimeError, EOFError, ValueError, LookupError, AttributeError, TypeError)


@dataclass(frozen=True)
class StoredTensor:
    """A tensor that is not in memory yet.

    Args:
        name: Its name.
        shape: Its shape.
        dtype: Type of its numbers as torch calls it; for what is not floating-point as the file does.
        bytes: What it takes in the file.
        load: Reads it.
        same_as: Name of an earlier tensor of the very same memory; empty where there is none.
    """

    name: str
    shape: tuple[int, ...]
    dtype: str
    bytes: int
    load: Callable[[], Tensor]
    same_as: str = ""


def stored_tensors(source: str | os.PathLike[str] | Mapping[str, Tensor]) -> list[StoredTensor]:
    """Return the tensors of a file, a folder or a mapping in their order; of files only the headers are read.

    One tensor of a safetensors file needs to fit into memory, all of a file of ``torch.save``: it is mapped, not read.
    Of a checkpoint the weights are found where they are nested under a usual name such as
    ``"state_dict"`` or ``"model"``; states of optimizers are left out.

    Args:
        source: A file of safetensors or of ``torch.save``, an index of shards (``*.index.json``), a folder with one
            of these, or tensors by name.

    Raises:
        FileNotFoundError: There is no such file, or a shard is missing.
        ValueError: It is no file of weights, is empty or damaged, or holds more than tensors.
        TypeError: A mapping holds something else than tensors.
    """
    if isinstance(source, Mapping):
        return list(_held(_checked(source)))
    path = Path(source)
    if not path.exists():
        raise FileNotFoundError(f"no weights at {path}: there is no such file. Give {KINDS}.")
    files = _files_in(path) if path.is_dir() else [path]
    found = [tensor for file in files for tensor in _tensors_in(file)]
    name, times = next(iter(Counter(tensor.name for tensor in found).most_common(1)), ("", 0))
    if times > 1:
        raise ValueError(f"{path}: {name!r} is in {times} of its {len(files)} files. Give one of them.")
    return found


def _files_in(folder: Path) -> list[Path]:
    """Return the index of a folder, or else its files of weights, of the safest kind that there is."""
    for pattern in ("*.index.json", "*.safetensors", "*.bin", "*.pt", "*.pth"):
        found = sorted(folder.glob(pattern))
        if found:
            return found[:1] if pattern == "*.index.json" else found
    raise ValueError(f"{folder}: the folder holds no file of weights. Give {KINDS}.")


def _tensors_in(file: Path) -> list[StoredTensor]:
    with open(file, "rb") as opened:
        head = opened.read(16)
    if not head:
        raise ValueError(f"{file} is empty. Give {KINDS}.")
    if head[:2] == b"PK" or head[0] == 0x80:
        return list(_held(_weights(_unpickled(file, zipped=head[:2] == b"PK"))))
    if head[8:9] == b"{":
        return _safetensors_in(file)
    if file.suffix == ".json":
        return _shards_of(file)
    raise ValueError(f"{file} is no file of weights: it starts with {head[:8]!r}. Give {KINDS}.")


# --- safetensors -------------------------------------------------------------------------------------------------


def _safetensors_in(file: Path) -> list[StoredTensor]:
    """Return the tensors that the header of a file names.

    The file is read by hand: safetensors maps all of it for torch, which the system refuses where it is larger than the
    memory.
    """
    with open(file, "rb") as opened:
        (length,) = struct.unpack("<Q", opened.read(8))
        try:
            if 8 + length > file.stat().st_size:
                raise ValueError("the header is cut off")
            header = json.loads(opened.read(length))
            header.pop("__metadata__", None)
            entries = ((name, entry) for name, entry in header.items() if not name.startswith(OPTIMIZER))
            return [_of_header(file, name, begin=8 + length, **entry) for name, entry in entries]
        except (ValueError, LookupError, AttributeError, TypeError) as error:
            raise ValueError(f"{file} is damaged or no file of safetensors: {error}.") from None


def _of_header(
    file: Path, name: str, *, begin: int, dtype: str, shape: list[int], data_offsets: tuple[int, int]
) -> StoredTensor:
    start, end = data_offsets
    if begin + end > file.stat().st_size:
        raise ValueError(f"it ends before {name!r} does")
    if dtype in FLOATING and end - start != prod(shape) * getattr(torch, FLOATING[dtype]).itemsize:
        raise ValueError(f"{name!r} takes {end - start} bytes, which {dtype} of shape {tuple(shape)} does not")

    def load() -> Tensor:
        numbers = bytearray(end - start)
        with open(file, "rb") as opened:
            opened.seek(begin + start)
            opened.readinto(numbers)
        return torch.frombuffer(numbers, dtype=getattr(torch, FLOATING[dtype])).reshape(shape)

    return StoredTensor(name, tuple(shape), FLOATING.get(dtype, dtype), end - start, load)


def _shards_of(index: Path) -> list[StoredTensor]:
    try:
        places = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
        shards = {str(place): None for place in places.values()}  # in their order, each once
    except (ValueError, LookupError, AttributeError, TypeError):
        raise ValueError(f"{index} is no index of shards: it has no 'weight_map' of names and files.") from None
    missing = next((name for name in shards if not (index.parent / name).is_file()), None)
    if missing is not None:
        raise FileNotFoundError(f"{index} names {missing}, which is not beside it. Fetch all {len(shards)} shards.")
    found = {tensor.name: tensor for name in shards for tensor in _tensors_in(index.parent / name)}
    absent = next((name for name in places if name not in found), None)
    if absent is not None:
        raise ValueError(f"{index} puts {absent!r} into {places[absent]}, which does not hold it.")
    return [found[name] for name in places]


# --- torch.save --------------------------------------------------------------------------------------------------


def _unpickled(file: Path, *, zipped: bool) -> Any:
    """Return what ``torch.save`` wrote, with tensors left on the disk where the format allows it."""
    try:
        return torch.load(file, map_location="cpu", weights_only=True, mmap=zipped)
    except BROKEN as error:
        refused = re.search(r"GLOBAL (\S+)", str(error))
        if refused is None:
            raise ValueError(f"{file} is damaged or no file of torch.save. Give {KINDS}.") from None
        raise ValueError(
            f"{file} holds a {refused.group(1)}, and to load that would run code of the file. "
            "Save model.state_dict() alone and give that file."
        ) from None


def _weights(loaded: Any) -> dict[str, Tensor]:
    """Return the weights in what was loaded, under their own names where they are nested under a usual one."""
    if isinstance(loaded, Tensor):
        return {"tensor": loaded}
    for home in HOMES:
        if isinstance(loaded, Mapping) and isinstance(loaded.get(home), Mapping) and (found := _weights(loaded[home])):
            return found
    return dict(_flat(loaded, ""))


def _flat(part: Any, prefix: str) -> Iterator[tuple[str, Tensor]]:
    for key, value in part.items() if isinstance(part, Mapping) else ():
        if isinstance(value, Tensor):
            yield f"{prefix}{key}", value
        elif not str(key).startswith(NOT_WEIGHTS):
            yield from _flat(value, f"{prefix}{key}.")


# --- tensors in memory -------------------------------------------------------------------------------------------


def _checked(tensors: Mapping[str, Any]) -> dict[str, Tensor]:
    for name, tensor in tensors.items():
        if not isinstance(tensor, Tensor):
            raise TypeError(f"a mapping must hold tensors by name, got {type(tensor).__name__} under {name!r}.")
    return {str(name): tensor for name, tensor in tensors.items()}


def _held(tensors: Mapping[str, Tensor]) -> Iterator[StoredTensor]:
    seen: dict[Any, str] = {}
    for name, tensor in tensors.items():
        one = _in_memory(name, tensor)
        if tensor.layout == torch.strided and not tensor.is_meta and tensor.numel():
            first = seen.setdefault((tensor.data_ptr(), tensor.shape, tensor.stride()), name)
            one = one if first == name else replace(one, same_as=first)
        yield one


def _in_memory(name: str, tensor: Tensor) -> StoredTensor:
    dtype = str(tensor.dtype).removeprefix("torch.")
    if tensor.layout != torch.strided:
        dtype = f"{str(tensor.layout).removeprefix('torch.')} {dtype}"
    elif tensor.is_meta:
        raise ValueError(f"analyze needs weights, but {name!r} is on the meta device. Load the trained weights first.")
    return StoredTensor(name, tuple(tensor.shape), dtype, tensor.numel() * tensor.element_size(), lambda: tensor)
