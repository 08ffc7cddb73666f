"""Whether the factors of a layer are still what the optimizer wrote last, in this run or in the one it resumes."""

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from dynarank.layers._factored import AbstractFactoredLayer
from dynarank.optim._layer_state import HALF

logger = logging.getLogger("dynarank")


@dataclass(frozen=True)
class Seal:
    """What a layer's tensors looked like: which they were, their versions and places in memory, and their norms."""

    tensors: list[Tensor]
    marks: Sequence[tuple[int, int, torch.dtype]]
    norms: Sequence[Tensor]
    threads: int

    def fits(self, tensors: Sequence[Tensor]) -> bool:
        """Whether these are the same tensors and nobody is known to have written to them."""
        same = len(tensors) == len(self.tensors) and all(map(_is, tensors, self.tensors))
        return same and _marks(tensors) == self.marks

    @property
    def slack(self) -> float:
        """Relative difference of norms that counts as none."""
        return 0.0 if self.threads == torch.get_num_threads() else 1e-5


class Seals:
    """Remembers the factors as they were written; whatever others do to them breaks the seal.

    Torch counts writes, but not those of fused optimizers nor those through ``parameter.data``. So norms are compared
    as well, to the last bit, or nearly where the number of threads, on which that bit depends, has changed.

    Args:
        whole: Whether norms are of all entries, or of the first row alone: enough for a method that is right in every
            gauge, since what escapes torch's counts are optimizers, which write to every row.
    """

    def __init__(self, *, whole: bool = True) -> None:
        self._whole = whole
        self._seals: dict[str, Seal] = {}
        self._expected: dict[str, int] = {}

    def set(self, name: str, layer: AbstractFactoredLayer) -> None:
        """Remember the layer's factors as they are now."""
        tensors = _held(layer)
        self._seals[name] = Seal(tensors, _marks(tensors), self._norms(tensors), torch.get_num_threads())
        self._expected.pop(name, None)

    def hold(self, name: str, layer: AbstractFactoredLayer) -> bool:
        """Whether the layer's factors are exactly those that were sealed."""
        return name in self.holding({name: layer})

    def holding(self, layers: Mapping[str, AbstractFactoredLayer]) -> frozenset[str]:
        """Return the names of those whose factors are exactly those that were sealed, waiting for the device once."""
        for name in self._expected.keys() & layers.keys():
            self._compare(name, layers[name], self._expected.pop(name))
        found = []
        for name, layer in layers.items():
            seal, tensors = self._seals.get(name), _held(layer)
            if seal is not None and seal.fits(tensors):
                found.append((name, seal, self._norms(tensors)))
        now = _numbers([norm for _, _, norms in found for norm in norms])
        then = _numbers([norm for _, seal, _ in found for norm in seal.norms])
        owners = [(name, seal.slack) for name, seal, norms in found for _ in norms]
        equal = zip(owners, now, then, strict=True)
        broken = {name for (name, slack), x, y in equal if not abs(x - y) <= slack * y}
        return frozenset(name for name, _, _ in found if name not in broken)

    def fingerprints(self, layers: Mapping[str, AbstractFactoredLayer]) -> list[int | None]:
        """Return, for each layer, what tells its sealed factors apart in another process; None where none hold."""
        held = self.holding(layers)
        return [fingerprint(layer) if name in held else None for name, layer in layers.items()]

    def expect(self, layers: Mapping[str, AbstractFactoredLayer], fingerprints: Sequence[int | None]) -> None:
        """Take over the seals of a saved run; the factors are compared when they are first looked at."""
        pairs = zip(layers, fingerprints, strict=True)
        self._seals, self._expected = {}, {name: check for name, check in pairs if check is not None}

    def _norms(self, tensors: list[Tensor]) -> Sequence[Tensor]:
        return _norms(tensors if self._whole else [t[:1] for t in tensors])

    def _compare(self, name: str, layer: AbstractFactoredLayer, expected: int) -> None:
        if fingerprint(layer) == expected:
            self.set(name, layer)
            return
        logger.warning(
            "%s: the factors are not those that the loaded optimizer state belongs to; its momentum starts afresh. "
            "Load model and optimizer from the same checkpoint, the model first.",
            name,
        )


def fingerprint(layer: AbstractFactoredLayer) -> int:
    """Return a number that tells whether factors are the same to the last bit, across runs and devices."""
    check = 0
    for tensor in _held(layer):
        bits = tensor.detach().contiguous().flatten().view(torch.int16)
        for part in bits.split(1 << 22):  # in parts, to bound the memory of the products in int64
            place = torch.arange(1, part.numel() + 1, device=part.device) % 65521
            check = (31 * check + int((part * place).sum())) % (1 << 61)
    return check


def _held(layer: AbstractFactoredLayer) -> list[Tensor]:
    """Return every tensor that makes up the weight: ``A, B`` or ``S, U, V``."""
    parameters = (layer._parameters.get(name) for name in layer.factor_names)
    tensors = (*parameters, *(layer._buffers.get(name) for name in layer.basis_names))
    return [t for t in tensors if t is not None]


def _is(one: object, other: object) -> bool:
    return one is other


def _marks(tensors: Sequence[Tensor]) -> list[tuple[int, int, torch.dtype]]:
    return [(t._version, t.data_ptr(), t.dtype) for t in tensors]


def _norms(tensors: list[Tensor]) -> Sequence[Tensor]:
    """Return the norm of each, in float32 for half precision: their own three digits would hide small changes."""
    # Always the tensors of one layer: what else is in the list may decide the last bit.
    return torch._foreach_norm([t.detach() for t in tensors], 2, torch.float32 if tensors[0].dtype in HALF else None)


def _numbers(norms: Sequence[Tensor]) -> list[float]:
    """Return the values, with one transfer from a device."""
    if all(norm.is_cpu for norm in norms):
        return [norm.item() for norm in norms]
    return torch.stack([norm.to(norms[-1].device, torch.float64) for norm in norms]).tolist()
