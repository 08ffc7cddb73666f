"""The books of a computation: which storages it allocates, for whom, and the most that is alive at once."""

import weakref
from collections import defaultdict
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class Ledger(TorchDispatchMode):
    """Keeps the bytes of all storages that were allocated since it was entered, and their peak.

    A storage counts from the operator that makes it until it is freed; what a kernel allocates for itself does not.
    What is first seen as an input was there before and does not count, unless it was told of by ``hold``. Fake tensors
    count as the real ones that they stand for.

    Attributes:
        live: Bytes alive now.
        peak: The most that were alive at once.
        owner: Under which name the storages to come are booked.
    """

    def __init__(self) -> None:
        super().__init__()
        self.live = self.peak = 0
        self.owner = ""
        self._known: dict[int, weakref.ref[Any]] = {}  # by address of the storage, which is free to be used again
        self._books: dict[str, int] = defaultdict(int)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        for leaf in tree_leaves((args, kwargs)):
            self._enter(leaf, allocated=False)
        output = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(output):
            self._enter(leaf, allocated=True)
        return output

    def hold(self, tensors: Iterable[Any]) -> int:
        """Count tensors that are there already, and pass over the rest; return the bytes that were not known."""
        before = self.live
        for tensor in tensors:
            self._enter(tensor, allocated=True)
        return self.live - before

    def books(self) -> dict[str, int]:
        """Return the bytes alive of each owner."""
        return {owner: size for owner, size in self._books.items() if size}

    def take_peak(self) -> int:
        """Return the peak and start a new one from what is alive now."""
        peak, self.peak = self.peak, self.live
        return peak

    def _enter(self, leaf: Any, *, allocated: bool) -> None:
        if not isinstance(leaf, Tensor) or leaf.layout is not torch.strided:
            return
        storage, owner = leaf.untyped_storage(), self.owner
        key, size = storage._cdata, storage.nbytes() if allocated else 0
        if key in self._known:
            return

        def leave(_: Any) -> None:
            self._known.pop(key)
            self.live -= size
            self._books[owner] -= size

        self._known[key] = weakref.ref(storage, leave)
        self.live += size
        self._books[owner] += size
        self.peak = max(self.peak, self.live)
