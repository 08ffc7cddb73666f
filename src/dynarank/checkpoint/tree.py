"""A nested state as a JSON tree plus named tensors, and back, with every type and bit intact.

JSON has no tuples, integer keys, infinities or tensors. Where JSON cannot say it, a node is an object whose first key
starts with ``$``:

====================================  ============================================================
``{"$tensor": name}``                 a tensor, by its name in the tensor file
``{"$tuple": [...]}``                 a tuple
``{"$dict": [[key, value], ...]}``    a dict with integer keys, or with string keys that start with ``$``
``{"$OrderedDict": [...]}``           an ``OrderedDict``, with ``$metadata`` where ``Module.state_dict`` left some
``{"$Counter": [...]}``               a ``Counter`` (``MultiStepLR`` keeps one)
``{"$float": hex}``                   infinity or NaN, as the 8 bytes of the double, big-endian
``{"$int": hex}``                     an integer beyond 2^53
====================================  ============================================================
"""

import struct
from collections import Counter, OrderedDict
from collections.abc import Callable, Hashable, Iterable
from dataclasses import dataclass, field
from math import isfinite
from typing import Any

from torch import Tensor

from dynarank.checkpoint.tensors import unstorable

MAX_DEPTH = 100
_EXACT_INT = 2**53
_MAPPINGS: dict[str, type] = {"$dict": dict, "$OrderedDict": OrderedDict, "$Counter": Counter}
_REMEDY = "Allowed: dict with str or int keys, OrderedDict, Counter, list, tuple, None, bool, int, float, str, tensor."


def flatten(value: Any, *, name: str) -> tuple[Any, dict[str, Tensor]]:
    """Split a nested state into a JSON tree and its tensors, named by their path.

    Two entries that are the same tensor (tied weights) are stored once and come back as one tensor. Views that overlap
    in part become independent. The tensors are not copied.

    Args:
        value: The state; see the module for what it may hold. Types are matched exactly, so a subclass that would come
            back as its base (``numpy.float64``, an ``IntEnum``, a named tuple) is refused.
        name: The first part of every tensor name.

    Raises:
        TypeError: If a part cannot be represented; the message names its path.

    Example:
        >>> import torch
        >>> tree, tensors = flatten({"lr": 0.1, "betas": (0.9, 0.99), "state": {0: torch.ones(2)}}, name="optimizer")
        >>> tree
        {'lr': 0.1, 'betas': {'$tuple': [0.9, 0.99]}, 'state': {'$dict': [[0, {'$tensor': 'optimizer/state/0'}]]}}
        >>> list(tensors)
        ['optimizer/state/0']
    """
    names = _Names()
    return _encode(value, (name,), names), names.tensors


def unflatten(tree: Any, *, tensor: Callable[[str], Any]) -> Any:
    """Rebuild the state that `flatten` split.

    Args:
        tree: The JSON tree.
        tensor: Returns the tensor of a name; called once per reference.

    Raises:
        ValueError: If the tree is not one that `flatten` writes.

    Example:
        >>> unflatten({"$tuple": [1, {"$float": "7ff0000000000000"}, {"$tensor": "w"}]}, tensor=str.upper)
        (1, inf, 'W')
    """
    if isinstance(tree, list):
        return [unflatten(item, tensor=tensor) for item in tree]
    if not isinstance(tree, dict):
        return tree
    tag = next(iter(tree), "")
    if not tag.startswith("$"):
        return {key: unflatten(item, tensor=tensor) for key, item in tree.items()}
    return _decode_tagged(tag, tree, tensor)


@dataclass
class _Names:
    """The tensors found so far: each under a unique name, the same tensor never under two."""

    tensors: dict[str, Tensor] = field(default_factory=dict)
    known: dict[Hashable, str] = field(default_factory=dict)

    def add(self, tensor: Tensor, path: tuple[str, ...]) -> str:
        identity = _identity(tensor)
        if identity not in self.known:
            self.known[identity] = self._unused("/".join(path))
            self.tensors[self.known[identity]] = tensor
        return self.known[identity]

    def _unused(self, name: str) -> str:
        # "a/b" may be one key or two, and 1 and "1" look alike; __metadata__ is reserved in the file format.
        unique, count = name, 1
        while unique in self.tensors or unique == "__metadata__":
            count += 1
            unique = f"{name}~{count}"
        return unique


def _identity(tensor: Tensor) -> Hashable:
    """Return a key that two tensors share only if they show the same memory in the same way."""
    if tensor.numel() == 0:
        return id(tensor)
    view = (tensor.dtype, tuple(tensor.shape), tensor.stride(), tensor.is_conj(), tensor.is_neg())
    return (tensor.device, tensor.data_ptr(), *view)


def _encode(value: Any, path: tuple[str, ...], names: _Names) -> Any:
    if len(path) > MAX_DEPTH:
        raise TypeError(f"{_show(path[:4])}/...: nested deeper than {MAX_DEPTH} levels, or holds itself.")
    if isinstance(value, Tensor):
        return _encode_tensor(value, path, names)
    encode = _ENCODERS.get(type(value))
    if encode is None:
        raise TypeError(f"{_show(path)}: a checkpoint cannot hold {type(value).__qualname__}. {_REMEDY}")
    return encode(value, path, names)


def _encode_tensor(value: Tensor, path: tuple[str, ...], names: _Names) -> dict[str, str]:
    reason = unstorable(value)
    if reason:
        raise TypeError(f"{_show(path)}: a checkpoint cannot hold {reason}")
    return {"$tensor": names.add(value, path)}


def _encode_itself(value: Any, path: tuple[str, ...], names: _Names) -> Any:
    return value


def _encode_int(value: int, path: tuple[str, ...], names: _Names) -> Any:
    return value if abs(value) <= _EXACT_INT else {"$int": hex(value)}


def _encode_float(value: float, path: tuple[str, ...], names: _Names) -> Any:
    # JSON writes the shortest decimal that reads back as the same double, -0.0 and denormals included.
    return value if isfinite(value) else {"$float": struct.pack(">d", value).hex()}


def _encode_str(value: str, path: tuple[str, ...], names: _Names) -> str:
    if any("\ud800" <= character <= "\udfff" for character in value):
        raise TypeError(f"{_show(path)}: the string {value!a} is not valid Unicode (it holds a lone surrogate).")
    return value


def _encode_list(value: list[Any], path: tuple[str, ...], names: _Names) -> list[Any]:
    return [_encode(item, (*path, str(index)), names) for index, item in enumerate(value)]


def _encode_tuple(value: tuple[Any, ...], path: tuple[str, ...], names: _Names) -> dict[str, Any]:
    return {"$tuple": _encode_list(list(value), path, names)}


def _encode_dict(value: dict[Any, Any], path: tuple[str, ...], names: _Names) -> dict[str, Any]:
    pairs = _encode_pairs(value, path, names)
    if all(isinstance(key, str) and not key.startswith("$") for key, _ in pairs):
        return dict(pairs)
    return {"$dict": [list(pair) for pair in pairs]}


def _encode_tagged_mapping(value: Any, path: tuple[str, ...], names: _Names) -> dict[str, Any]:
    node: dict[str, Any] = {f"${type(value).__name__}": [list(pair) for pair in _encode_pairs(value, path, names)]}
    if hasattr(value, "_metadata"):
        # The versions of the modules, by which load_state_dict recognises old layouts.
        node["$metadata"] = _encode(value._metadata, (*path, "_metadata"), names)
    return node


def _encode_pairs(value: dict[Any, Any], path: tuple[str, ...], names: _Names) -> list[tuple[Any, Any]]:
    for key in value:
        if type(key) not in (str, int):
            raise TypeError(f"{_show(path)}: the key {key!r} is a {type(key).__qualname__}; keys must be str or int.")
    return [(_encode(key, path, names), _encode(item, (*path, _part(key)), names)) for key, item in value.items()]


def _part(key: str | int) -> str:
    # hex, since Python refuses to print integers of more than 4300 digits
    return key if isinstance(key, str) else str(key) if abs(key) <= _EXACT_INT else hex(key)


_ENCODERS: dict[type, Callable[[Any, tuple[str, ...], _Names], Any]] = {
    type(None): _encode_itself,
    bool: _encode_itself,
    int: _encode_int,
    float: _encode_float,
    str: _encode_str,
    list: _encode_list,
    tuple: _encode_tuple,
    dict: _encode_dict,
    OrderedDict: _encode_tagged_mapping,
    Counter: _encode_tagged_mapping,
}


def _show(path: Iterable[str]) -> str:
    return "/".join(path).encode("utf-8", "backslashreplace").decode()


def _decode_tagged(tag: str, node: dict[str, Any], tensor: Callable[[str], Any]) -> Any:
    content = node[tag]
    if tag in _MAPPINGS and isinstance(content, list):
        return _decode_mapping(tag, node, tensor)
    if len(node) == 1 and tag == "$tuple" and isinstance(content, list):
        return tuple(unflatten(content, tensor=tensor))
    if len(node) == 1 and tag in _DECODERS and isinstance(content, str):
        return tensor(content) if tag == "$tensor" else _DECODERS[tag](content)
    raise ValueError(f"no such node in a state tree: {str(node)[:80]}.")


def _decode_mapping(tag: str, node: dict[str, Any], tensor: Callable[[str], Any]) -> Any:
    mapping: Any = _MAPPINGS[tag]()
    for pair in node[tag]:
        key = unflatten(pair[0], tensor=tensor) if isinstance(pair, list) and len(pair) == 2 else None
        if type(key) not in (str, int) or key in mapping:
            raise ValueError(f"no such entry in a {tag} of a state tree: {str(pair)[:80]}.")
        mapping[key] = unflatten(pair[1], tensor=tensor)
    if set(node) - {tag, "$metadata"} or (tag == "$dict" and len(node) > 1):
        raise ValueError(f"a {tag} of a state tree has unknown parts: {sorted(node)}.")
    if "$metadata" in node:
        mapping._metadata = unflatten(node["$metadata"], tensor=tensor)
    return mapping


def _decode_float(content: str) -> float:
    if len(content) != 16:
        raise ValueError(f"a $float needs 16 hexadecimal digits, got {content[:40]!r}.")
    return struct.unpack(">d", bytes.fromhex(content))[0]


def _decode_int(content: str) -> int:
    return int(content, 16)


_DECODERS: dict[str, Callable[[str], Any]] = {"$float": _decode_float, "$int": _decode_int, "$tensor": str}
