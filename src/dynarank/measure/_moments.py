"""Second moments of the inputs of layers over calibration batches, in one streaming pass or several."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from dynarank import linalg
from dynarank.measure._batches import Batches, NonFiniteInputError, run
from dynarank.measure._forward import Forward, call, evaluating, unfused, watching
from dynarank.measure._patches import Patches, blocks, patches_of
from dynarank.measure._sharing import Identities, group

Group = tuple[str, ...]  # layers that share one sum; the first of them accumulates it


@dataclass(frozen=True)
class Moments:
    """Moments of the rows ``x`` that a weight matrix ``W (m, n)`` is multiplied by, in float64 on the CPU.

    Attributes:
        second: Mean of ``x x^T``, symmetric and not centred, ``(n, n)``: ``trace(W second W^T)`` is the mean of
            ``||W x||^2``.
        mean: Mean of ``x``, ``(n,)``.
        rows: Number of rows.
    """

    second: Tensor
    mean: Tensor
    rows: int


def input_moments(
    model: nn.Module,
    modules: Mapping[str, nn.Module],
    batches: Iterable[Any],
    *,
    forward: Forward = call,
    memory: int = 2 * 2**30,
) -> dict[str, Moments]:
    """Return the second moment and the mean of the inputs of each layer over all batches.

    The row of a convolution is its flattened patch, in the order of ``weight.flatten(1)``. Every row counts alike,
    those of padding tokens too. Batches are streamed; where the sums need more than ``memory``, the batches are gone
    over several times. Products are taken in at least float32 and added up in float64. Layers that receive the very
    same tensors in the same way, such as query, key and value, get one common `Moments`.

    Args:
        model: The model, run in eval mode without gradients; training flags are put back.
        modules: Layers by name: ``nn.Linear``, convolutions with one group, low-rank layers.
        batches: What ``forward`` takes, at least one; a list, a DataLoader or, if one pass is enough, an iterator.
        forward: How a batch enters the model.
        memory: Bytes that the sums may take at once where the layers are; a single layer may exceed it. The results
            are on the CPU and not counted.

    Returns:
        Moments by name. A layer that was never called, or never with a row, has no entry.

    Raises:
        ValueError: There are no batches, a batch does not fit the model, an input holds NaN or infinity, or a second
            pass gave another number of batches.
        TypeError: A layer is of another kind, or several passes are needed and the batches are an iterator.

    Example:
        >>> net = nn.Linear(3, 2)
        >>> found = input_moments(net, {"fc": net}, [torch.ones(4, 3), 2 * torch.ones(4, 3)])["fc"]
        >>> found.rows, found.mean.tolist(), found.second[0].tolist()
        (8, [1.5, 1.5, 1.5], [2.5, 2.5, 2.5])
    """
    if memory < 1:
        raise ValueError(f"memory must be at least 1 byte, got {memory}.")
    patches = {name: patches_of(name, layer) for name, layer in modules.items()}
    source = Batches(batches)
    with evaluating(model), unfused():
        collector = _Collector(model, modules, patches, forward)
        waiting = collector.find_groups(source.first())
        source.announce(len(_select(waiting, patches, memory)), memory)
        while waiting:
            chosen = _select(waiting, patches, memory)[0]
            strays = collector.collect(chosen, source)
            waiting = [names for names in waiting if names not in chosen] + [(name,) for name in strays]
    return {name: collector.found[name] for name in modules if name in collector.found}


def _select(groups: list[Group], patches: Mapping[str, Patches], memory: int) -> list[list[Group]]:
    """Return the groups pass by pass, each pass with as many as fit into the memory."""
    passes: list[list[Group]] = []
    free = 0
    for names in groups:
        needed = 8 * patches[names[0]].columns ** 2
        if not passes or needed > free:
            passes.append([])
            free = memory
        passes[-1].append(names)
        free -= needed
    return passes


class _Collector:
    """Runs the model over the batches with hooks on some layers."""

    def __init__(
        self, model: nn.Module, modules: Mapping[str, nn.Module], patches: dict[str, Patches], forward: Forward
    ) -> None:
        self.model, self.modules, self.patches, self.forward = model, modules, patches, forward
        self.found: dict[str, Moments] = {}

    def find_groups(self, batch: Any) -> list[Group]:
        """Return the layers in groups that share their inputs in this batch; nothing is added up."""
        identities, inputs = Identities(), {name: [] for name in self.modules}

        def note(name: str, layer: nn.Module, x: Tensor, output: Any) -> None:
            inputs[name].append(identities.number(x))

        with watching(self.modules, note):
            run(self.forward, self.model, batch, 0)
        return group(self.patches, inputs)

    def collect(self, groups: list[Group], source: Batches) -> list[str]:
        """Find the moments of these groups; return the layers that did not go along with theirs in every batch."""
        leaders = {name: names[0] for names in groups for name in names}
        sums = {names[0]: _Sum(self.patches[names[0]]) for names in groups}
        strays: set[str] = set()
        for index, batch in enumerate(source):
            inputs = self._add(batch, index, leaders, sums)
            strays |= {name for name, leader in leaders.items() if inputs[name] != inputs[leader]}
        results = {leader: total.moments() for leader, total in sums.items() if total.rows}
        self.found |= {
            name: results[leader] for name, leader in leaders.items() if name not in strays and leader in results
        }
        return [name for name in leaders if name in strays]

    def _add(self, batch: Any, index: int, leaders: dict[str, str], sums: dict[str, "_Sum"]) -> dict[str, list[int]]:
        identities, inputs = Identities(), {name: [] for name in leaders}

        def note(name: str, layer: nn.Module, x: Tensor, output: Any) -> None:
            inputs[name].append(identities.number(x))
            if name in sums and not sums[name].add(x):
                raise NonFiniteInputError(f"{name}: the input holds NaN or infinity in calibration batch {index}.")

        with watching({name: self.modules[name] for name in leaders}, note):
            run(self.forward, self.model, batch, index)
        return inputs


class _Sum:
    """Sums of ``d d^T`` and ``d`` in float64, where the inputs are, with ``d = x - origin``.

    The origin is the mean of the first rows: in float32 the squares of inputs far from zero would drown their spread.
    """

    def __init__(self, patches: Patches) -> None:
        self.patches = patches
        self.rows = 0
        self.second = self.mean = self.origin = torch.zeros(())

    def add(self, x: Tensor) -> bool:
        """Add the rows of one input; return whether they are finite."""
        if not self.rows:
            n = self.patches.columns
            self.second = torch.zeros(n, n, dtype=torch.float64, device=x.device)
            self.mean = torch.zeros(n, dtype=torch.float64, device=x.device)
        with torch.autocast(x.device.type, enabled=False):
            return all(self._add_block(linalg.widen(block)) for block in blocks(x.detach(), self.patches))

    def _add_block(self, block: Tensor) -> bool:
        if not self.rows and len(block):
            self.origin = block.mean(0).nan_to_num(0.0, 0.0, 0.0)
        offset = block - self.origin
        gram = offset.mT @ offset  # (n, n)
        if not bool(gram.diagonal().isfinite().all()):  # sums of squares: they show every NaN and infinity
            if not bool(block.isfinite().all()):
                return False
            offset = block.double() - self.origin.double()  # the squares alone were too large for float32
            gram = offset.mT @ offset
        self.second += gram
        self.mean += offset.sum(0, dtype=torch.float64)
        self.rows += len(block)
        return True

    def moments(self) -> Moments:
        second = self.second.cpu()
        second = (second + second.mT).div_(2 * self.rows)  # a product of float32 is symmetric to rounding only
        origin, offset = self.origin.double().cpu(), self.mean.cpu() / self.rows
        mean = origin + offset
        second.addr_(mean, mean).addr_(offset, offset, alpha=-1)
        return Moments(second, mean, self.rows)
