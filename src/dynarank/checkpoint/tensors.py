"""One safetensors file: what a tensor looks like in it, how it is written piece by piece, and how it is read.

``safetensors.torch.save_file`` would hold a copy of every tensor in the memory of the CPU at once, and needs numpy.
This writer copies one tensor at a time, from whatever device, and its bytes can be hashed on their way to the disk.
"""

import ctypes
import json
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

# What every release of safetensors reads. Other dtypes are stored bit by bit as one of these.
_CODES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint8: "U8",
    torch.bool: "BOOL",
    torch.float8_e4m3fn: "F8_E4M3",
    torch.float8_e5m2: "F8_E5M2",
}
# Complex numbers become pairs of reals in one more dimension, and the rest keeps its bits.
_STORED_AS = {
    "complex128": torch.float64,
    "complex64": torch.float32,
    "complex32": torch.float16,
    "uint64": torch.int64,
    "uint32": torch.int32,
    "uint16": torch.int16,
    "float8_e4m3fnuz": torch.uint8,
    "float8_e5m2fnuz": torch.uint8,
    "float8_e8m0fnu": torch.uint8,  # torch 2.7
    "float4_e2m1fn_x2": torch.uint8,  # torch 2.8
}
# Every dtype a checkpoint can hold on this torch: name -> (dtype, dtype in the file).
_DTYPES = {_name: (getattr(torch, _name), _stored) for _name, _stored in _STORED_AS.items() if hasattr(torch, _name)}
_DTYPES |= {str(_dtype).removeprefix("torch."): (_dtype, _dtype) for _dtype in _CODES}


def unstorable(tensor: Tensor) -> str | None:
    """Return what a tensor is that a file cannot hold, with the remedy; None for an ordinary tensor.

    Example:
        >>> unstorable(torch.ones(2, device="meta"))
        'a tensor on the meta device. Give it values first.'
        >>> unstorable(torch.ones(2)) is None
        True
    """
    if type(tensor) not in (Tensor, torch.nn.Parameter):
        return f"a {type(tensor).__qualname__}. Convert it to a plain tensor first."
    if tensor.layout != torch.strided:
        return f"a tensor of layout {tensor.layout}. Call to_dense() first."
    if tensor.device.type == "meta":
        return "a tensor on the meta device. Give it values first."
    if _name_of(tensor.dtype) not in _DTYPES:
        return f"a tensor of dtype {tensor.dtype}. Allowed: {', '.join(sorted(_DTYPES))}."
    return None


def describe(tensor: Tensor) -> dict[str, Any]:
    """Return shape, dtype and, where it is not the usual one, the order of the dimensions in memory.

    A resumed run is only the same run if a reduction over a ``channels_last`` momentum walks it in the same order, so
    dense layouts are kept. Strides with gaps or overlaps are not.

    Example:
        >>> describe(torch.ones(2, 3))
        {'shape': [2, 3], 'dtype': 'float32'}
        >>> describe(torch.ones(2, 3).T)
        {'shape': [3, 2], 'dtype': 'float32', 'order': [1, 0]}
    """
    spec: dict[str, Any] = {"shape": list(tensor.shape), "dtype": _name_of(tensor.dtype)}
    kept = torch.empty_like(tensor, device="meta")  # its strides are those that preserve_format keeps
    if not kept.is_contiguous():
        spec["order"] = sorted(range(kept.dim()), key=lambda dimension: -kept.stride(dimension))
    return spec


def check_spec(spec: Any) -> None:
    """Check a description read from a file.

    Raises:
        ValueError: If it is not one that `describe` returns on this version of torch.
    """
    if not isinstance(spec, dict) or not {"shape", "dtype"} <= set(spec) <= {"shape", "dtype", "order"}:
        raise ValueError(f"needs a shape and a dtype, got {str(spec)[:80]}.")
    shape, order = spec["shape"], spec.get("order")
    if not isinstance(shape, list) or any(type(size) is not int or size < 0 for size in shape):
        raise ValueError(f"shape must be a list of sizes, got {str(shape)[:80]}.")
    if not isinstance(spec["dtype"], str) or spec["dtype"] not in _DTYPES:
        available = f"Available with torch {torch.__version__}: {', '.join(sorted(_DTYPES))}."
        raise ValueError(f"unknown dtype {spec['dtype']!r}. {available}")
    if order is not None and (not isinstance(order, list) or not _is_permutation(order, of=len(shape))):
        raise ValueError(f"order must be a permutation of the {len(shape)} dimensions, got {str(order)[:80]}.")


def pieces(tensors: Mapping[str, Tensor]) -> Iterator[bytes | memoryview]:
    """Yield the bytes of a safetensors file, one tensor after the other.

    A piece is a window on a tensor where that is on the CPU, so the tensors must not change until it is written.

    Example:
        >>> import safetensors.torch
        >>> safetensors.torch.load(b"".join(pieces({"model/fc.A": torch.arange(3)})))
        {'model/fc.A': tensor([0, 1, 2])}
    """
    # Widest elements first: then every tensor starts at a multiple of its element size.
    ordered = sorted(tensors.items(), key=lambda item: -item[1].dtype.itemsize)
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name, tensor in ordered:
        code, shape = _stored_form(describe(tensor))
        start, end = end, end + tensor.numel() * tensor.dtype.itemsize
        header[name] = {"dtype": code, "shape": shape, "data_offsets": [start, end]}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    yield len(text).to_bytes(8, "little")
    yield text
    for _, tensor in ordered:
        if tensor.numel():
            yield _bytes_of(_to_stored(tensor))


def check_file(path: Path, specs: Mapping[str, Any]) -> None:
    """Check that a file holds exactly the tensors described, by name, shape and dtype; no values are read.

    Raises:
        ValueError: If the file is not in the safetensors format or holds something else.
    """
    try:
        with safe_open(path, framework="pt") as file:
            found = set(file.keys())
            if found != set(specs):
                raise ValueError(
                    f"{path} and the manifest name different tensors: only in the file {sorted(found - set(specs))}, "
                    f"only in the manifest {sorted(set(specs) - found)}."
                )
            for name in found:
                entry = file.get_slice(name)
                _check_entry(path, name, (entry.get_dtype(), list(entry.get_shape())), _stored_form(specs[name]))
    except SafetensorError as cause:
        raise ValueError(f"{path} is not a safetensors file: {cause}.") from cause


def read(path: Path, specs: Mapping[str, Any], names: Iterable[str]) -> dict[str, Tensor]:
    """Return the named tensors on the CPU, in memory of their own.

    Raises:
        ValueError: If the file cannot be read as a safetensors file.
    """
    try:
        with safe_open(path, framework="pt") as file:
            # clone: the tensor is a window on the file, unaligned, and gone wrong if the file is cut short
            return {name: _from_stored(file.get_tensor(name).clone(), specs[name]) for name in names}
    except SafetensorError as cause:
        raise ValueError(f"{path} is not a safetensors file: {cause}.") from cause


def _check_entry(path: Path, name: str, found: tuple[str, list[int]], declared: tuple[str, list[int]]) -> None:
    if found != declared:
        raise ValueError(
            f"{path}: tensor {name!r} has dtype {found[0]} and shape {found[1]}, "
            f"but the manifest declares {declared[0]} and {declared[1]}."
        )


def _name_of(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _is_permutation(order: list[Any], *, of: int) -> bool:
    return all(type(dimension) is int for dimension in order) and sorted(order) == list(range(of))


def _stored_form(spec: Mapping[str, Any]) -> tuple[str, list[int]]:
    """Return the safetensors dtype and shape under which a described tensor is stored."""
    dtype, stored = _DTYPES[spec["dtype"]]
    return _CODES[stored], [*spec["shape"], 2] if dtype.is_complex else list(spec["shape"])


def _to_stored(tensor: Tensor) -> Tensor:
    """Return the values as a contiguous tensor of the stored dtype on the CPU."""
    values = tensor.detach().resolve_conj().resolve_neg().cpu().contiguous()
    if values.is_complex():
        return torch.view_as_real(values)
    return values.view(_DTYPES[_name_of(tensor.dtype)][1])


def _from_stored(stored: Tensor, spec: Mapping[str, Any]) -> Tensor:
    dtype, _ = _DTYPES[spec["dtype"]]
    values = torch.view_as_complex(stored) if dtype.is_complex else stored.view(dtype)
    if "order" not in spec:
        return values
    inverse = sorted(range(values.dim()), key=spec["order"].__getitem__)
    return values.permute(spec["order"]).contiguous().permute(inverse)


def _bytes_of(tensor: Tensor) -> memoryview:
    """Return a window on the memory of a contiguous CPU tensor, which it keeps alive."""
    memory = (ctypes.c_ubyte * tensor.nbytes).from_address(tensor.data_ptr())
    memory.owner = tensor  # pyright: ignore[reportAttributeAccessIssue]
    return memoryview(memory).cast("B")
