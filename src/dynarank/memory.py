"""Memory of a training step before training: the step is followed on tensors that have shapes but no values."""

import copy
import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import (
    DataDependentOutputException,
    DynamicOutputShapeException,
    FakeTensorMode,
    UnsupportedFakeTensorException,
    UnsupportedOperatorException,
)
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from dynarank.measure import Forward, Loss, StepMemory, call
from dynarank.measure._training import check_step, watch_steps
from dynarank.optim.low_rank_optimizer import LowRankOptimizer

UNKNOWN = (
    DataDependentOutputException,
    DynamicOutputShapeException,
    UnsupportedFakeTensorException,
    UnsupportedOperatorException,
)
aten = torch.ops.aten


def memory_report(
    model: nn.Module, optimizer: torch.optim.Optimizer, batch: Any, *, loss: Loss | None = None, forward: Forward = call
) -> StepMemory:
    """Predict the bytes of a training step, per layer and at their peak, without taking one.

    The model's forward pass, the loss, the backward pass and the optimizer's own ``step`` run on tensors without
    memory, which torch calls fake, and a ledger counts what they would allocate. So checkpointed activations, tied
    weights, and the decompositions of an integrator count as they are. Questions about values are answered as in a
    step without trouble: all gradients are finite, no factor is singular. A change of ranks does not count.

    Args:
        model: The model, in the mode that it is in. On the meta device it has no memory either, and counts as on the
            CPU. Neither it nor the optimizer nor the generators are changed.
        optimizer: What trains it: one of ``torch.optim`` or a ``LowRankOptimizer``, with one gradient a step.
        batch: What ``forward`` takes; on the meta device for a batch without memory.
        loss: The loss, given the outputs and the batch. By default the outputs' own ``loss``, or their mean, which
            keeps nothing for the backward pass.
        forward: How a batch enters the model.

    Raises:
        ValueError: The optimizer does not train the model, or takes several gradients; the batch does not fit the
            model; or the loss is no number that can be differentiated.
        TypeError: ``call`` does not know the kind of the batch, or the outputs have no mean.
        RuntimeError: The model's shapes depend on values.

    Example:
        >>> from dynarank.factorize import factorize_
        >>> model, batch = nn.Sequential(nn.Linear(400, 400), nn.ReLU(), nn.Linear(400, 10)), torch.zeros(8, 400)
        >>> dense = memory_report(model, torch.optim.AdamW(model.parameters()), batch)
        >>> print(dense)
        MB                   weights  gradients  optimizer state  activations  total
        0                      0.642      0.642              1.3            0    2.6
        1                          0          0                0        0.013  0.013
        2                      0.016      0.016            0.032            0  0.064
        (outside of layers)        0          0                0        0.000  0.000
        all                    0.658      0.658              1.3        0.013    2.6
        peak 3.9 MB: forward 2.0, backward 2.6, update 3.9
        >>> factorised = factorize_(model, rank=20)
        >>> low_rank = memory_report(model, LowRankOptimizer(model), batch)
        >>> low_rank.peak < dense.peak / 4, low_rank.activations > dense.activations
        (True, True)
    """
    check_step(model, optimizer)
    fake = FakeTensorMode()
    model, optimizer, batch = _without_memory(fake, model, optimizer, batch)
    with _quiet(), torch.enable_grad(), fake, _Untroubled():
        if isinstance(optimizer, LowRankOptimizer):
            _settle(optimizer)
        try:
            return watch_steps(model, optimizer, batch, loss=loss, forward=forward)
        except UNKNOWN as error:
            raise RuntimeError(
                f"memory_report cannot follow a step whose shapes depend on values ({error}). "
                "Measure one instead: dynarank.measure.training_memory takes real steps on copies."
            ) from error


@contextmanager
def _quiet() -> Iterator[None]:
    """Silence what torch says about fake tensors: errors twice, and that their addresses, all 0, are compared."""
    logger = logging.getLogger("torch._subclasses.fake_tensor")
    disabled, logger.disabled = logger.disabled, True
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "Accessing the data pointer of FakeTensor")
            yield
    finally:
        logger.disabled = disabled


def _settle(optimizer: LowRankOptimizer) -> None:
    """Let a copy take its factors for what it wrote last, and hold no rank event."""
    optimizer.frozen = True
    optimizer.seals.expect({}, [])
    for name, layer in optimizer.layers.items():
        optimizer.seals.set(name, layer)


def _without_memory(fake: FakeTensorMode, model: nn.Module, optimizer: torch.optim.Optimizer, batch: Any) -> Any:
    """Return copies that share nothing with the originals and hold fake tensors, on the CPU for the meta device."""
    states = [leaf for kept in optimizer.state.values() for leaf in tree_leaves(kept)]
    leaves = (*model.parameters(), *model.buffers(), *states, *tree_leaves(batch))
    memo = {id(leaf): _stand_in(fake, leaf) for leaf in leaves if isinstance(leaf, Tensor)}
    return copy.deepcopy((model, optimizer, batch), memo)


def _stand_in(fake: FakeTensorMode, tensor: Tensor) -> Tensor:
    if not tensor.is_meta:
        return fake.from_tensor(tensor, static_shapes=True)
    with fake:
        there = torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype)
        return nn.Parameter(there, tensor.requires_grad) if isinstance(tensor, nn.Parameter) else there


class _Untroubled(TorchDispatchMode):
    """Answers questions about values: ``all`` is true, ``any`` is false, a number is 1, two tensors are equal."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        try:
            output = func(*args, **(kwargs or {}))
        except DataDependentOutputException:
            if func is aten.equal.default:
                return True
            if func is not aten._local_scalar_dense.default:
                raise
            (asked,) = args
            number = 1.0 if asked.is_floating_point() else 1
            return getattr(asked, "_found", True) if asked.dtype == torch.bool else number
        if func.overloadpacket is aten.any:
            output._found = False
        return output
