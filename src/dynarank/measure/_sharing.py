"""Which layers receive the very same inputs, such as query, key and value: one accumulation serves them all."""

import weakref
from collections.abc import Mapping
from typing import Any

from torch import Tensor

from dynarank.measure._patches import Patches


class Identities:
    """Numbers the tensors of one forward pass: two get the same number if they are one object in one state."""

    def __init__(self) -> None:
        # Weak, so that no activation lives longer for being numbered; an address may then be used again.
        self._seen: dict[int, tuple[weakref.ref[Tensor], int, int]] = {}
        self._count = 0

    def number(self, x: Tensor) -> int:
        """Return the number of a tensor; writing to it in place makes it another one."""
        version = -1 if x.is_inference() else x._version  # without a version, in-place writes cannot be told
        found = self._seen.get(id(x))
        if version >= 0 and found is not None and found[0]() is x and found[1] == version:
            return found[2]
        self._count += 1
        self._seen[id(x)] = (weakref.ref(x), version, self._count)
        return self._count


def group(patches: Mapping[str, Patches], inputs: Mapping[str, list[int]]) -> list[tuple[str, ...]]:
    """Return the layers in groups that cut the same inputs in the same way; a layer without inputs is alone.

    Args:
        patches: How each layer cuts its input.
        inputs: Numbers of the inputs of each layer in one forward pass.

    Example:
        >>> rows = {name: Patches(8) for name in ("query", "key", "out", "spare")}
        >>> group(rows, {"query": [1], "key": [1], "out": [2], "spare": []})
        [('query', 'key'), ('out',), ('spare',)]
    """
    groups: dict[Any, list[str]] = {}
    for name, cut in patches.items():
        key = (cut, *inputs[name]) if inputs[name] else name
        groups.setdefault(key, []).append(name)
    return [tuple(names) for names in groups.values()]
