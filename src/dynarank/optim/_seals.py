"""Whether the factors of a layer are still what the optimizer wrote last, in this run or in the one it resumes."""

import logging
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from dynarank.layers.base import AbstractLowRankLayer

logger = logging.getLogger("dynarank")


class Seals:
    """Remembers the factors as they were written; any later write, load or replacement by others breaks the seal.

    A change through ``parameter.data`` escapes torch's version counter, unless it replaces the whole tensor.
    """

    def __init__(self) -> None:
        self._marks: dict[str, list[tuple[Tensor, int, int, torch.dtype]]] = {}
        self._expected: dict[str, int] = {}

    def set(self, name: str, layer: AbstractLowRankLayer) -> None:
        """Remember the layer's factors as they are now."""
        self._marks[name] = _marks(layer)
        self._expected.pop(name, None)

    def hold(self, name: str, layer: AbstractLowRankLayer) -> bool:
        """Whether the layer's factors are exactly those that were sealed."""
        if name in self._expected:
            self._compare(name, layer, self._expected.pop(name))
        now, sealed = _marks(layer), self._marks.get(name, [])
        return len(now) == len(sealed) and all(
            p is q and rest == marks for (p, *rest), (q, *marks) in zip(now, sealed, strict=True)
        )

    def fingerprints(self, layers: Mapping[str, AbstractLowRankLayer]) -> list[int | None]:
        """Return, for each layer, what tells its sealed factors apart in another process; None where none hold."""
        return [fingerprint(layer) if self.hold(name, layer) else None for name, layer in layers.items()]

    def expect(self, layers: Mapping[str, AbstractLowRankLayer], fingerprints: Sequence[int | None]) -> None:
        """Take over the seals of a saved run; the factors are compared when they are first looked at."""
        pairs = zip(layers, fingerprints, strict=True)
        self._marks, self._expected = {}, {name: check for name, check in pairs if check is not None}

    def _compare(self, name: str, layer: AbstractLowRankLayer, expected: int) -> None:
        if fingerprint(layer) == expected:
            self._marks[name] = _marks(layer)
            return
        logger.warning(
            "%s: the factors are not those that the loaded optimizer state belongs to; its momentum starts afresh. "
            "Load model and optimizer from the same checkpoint, the model first.",
            name,
        )


def _held(layer: AbstractLowRankLayer) -> list[Tensor]:
    """Return every tensor that makes up the weight: ``A, B`` or ``S, U, V``."""
    tensors = (*(layer._parameters.get(name) for name in "ABS"), *(layer._buffers.get(name) for name in "UV"))
    return [t for t in tensors if t is not None]


def _marks(layer: AbstractLowRankLayer) -> list[tuple[Tensor, int, int, torch.dtype]]:
    return [(t, t._version, t.data_ptr(), t.dtype) for t in _held(layer)]


def fingerprint(layer: AbstractLowRankLayer) -> int:
    """Return a number that tells whether factors are the same to the last bit, across runs and devices."""
    check = 0
    for tensor in _held(layer):
        bits = tensor.detach().contiguous().flatten().view(torch.int16)
        for part in bits.split(1 << 22):  # in parts, to bound the memory of the products in int64
            place = torch.arange(1, part.numel() + 1, device=part.device) % 65521
            check = (31 * check + int((part * place).sum())) % (1 << 61)
    return check
