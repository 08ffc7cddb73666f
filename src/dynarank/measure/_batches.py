"""Calibration batches: gone over once or several times, with errors that name the batch."""

import re
from collections.abc import Iterable, Iterator, Mapping
from itertools import chain
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map

from dynarank.measure._forward import Forward

# How torch words it when an input has the wrong shape; everything else that a model raises is passed on as it is.
SHAPE_ERROR = re.compile(r"shape|size|dimension|channel|elements|mat1 and mat2|\b[1-5]D\b", re.IGNORECASE)


class NonFiniteInputError(ValueError):
    """An input holds NaN or infinity: our own refusal, not an error of the model."""


class Batches:
    """Batches of which the first can be looked at before the first pass.

    Raises:
        ValueError: There are none, or a later pass gave another number of batches than the first.
        TypeError: They are a single batch.
    """

    def __init__(self, batches: Iterable[Any]) -> None:
        if isinstance(batches, Tensor | Mapping):
            raise TypeError(
                f"batches must be a list of batches or a DataLoader, got {type(batches).__name__}; pass [batch]."
            )
        self._batches = batches
        self._length: int | None = None
        self._ahead: Iterator[Any] | None = None

    def first(self) -> Any:
        """Return the first batch; it comes again in the first pass."""
        iterator = iter(self._batches)
        for batch in iterator:
            self._ahead = chain([batch], iterator)
            return batch
        raise ValueError("batches must hold at least one calibration batch, got none.")

    def announce(self, passes: int, memory: int) -> None:
        """Refuse an iterator where there will be several passes."""
        if passes > 1:
            self._check_iterable_again(f"{passes} passes are needed to keep the sums within memory = {memory} bytes")

    def __iter__(self) -> Iterator[Any]:
        if self._ahead is None:
            self._check_iterable_again("another pass is needed, since layers stopped sharing their inputs")
        iterator, self._ahead = self._ahead or iter(self._batches), None
        length = 0
        for batch in iterator:
            yield batch
            length += 1
        if self._length not in (None, length):
            raise ValueError(
                f"batches gave {self._length} batches on the first pass and {length} on another; pass a list."
            )
        self._length = length

    def _check_iterable_again(self, why: str) -> None:
        if isinstance(self._batches, Iterator):
            raise TypeError(
                f"{why}, but batches is a {type(self._batches).__name__} that is gone after one; "
                "pass a list or a DataLoader."
            )


def copied(batch: Any) -> Any:
    """Return a batch with copies of its tensors: it is computed more than once, and models may write to it."""
    return tree_map(lambda leaf: leaf.clone() if isinstance(leaf, Tensor) else leaf, batch)


def run(forward: Forward, model: nn.Module, batch: Any, index: int) -> Any:
    """Compute one batch, on copies of its tensors, and return what ``forward`` returns.

    Raises:
        ValueError: The batch does not fit the model.
    """
    try:
        return forward(model, copied(batch))
    except (torch.OutOfMemoryError, NonFiniteInputError):
        raise
    except (RuntimeError, ValueError, IndexError) as error:
        if not SHAPE_ERROR.search(str(error)):
            raise
        raise ValueError(
            f"calibration batch {index} of shape {_describe(batch)} does not fit the model: {error}"
        ) from error


def _describe(batch: Any) -> str:
    if isinstance(batch, Tensor):
        return str(tuple(batch.shape))
    if isinstance(batch, Mapping):
        return ", ".join(f"{name} {_describe(value)}" for name, value in batch.items())
    if isinstance(batch, tuple | list) and batch:
        return _describe(batch[0])
    return type(batch).__name__
