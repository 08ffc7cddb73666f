"""Bytes of one training step: what is held, what is kept for the backward pass, and the most alive at once."""

import copy
import inspect
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from dynarank.measure._batches import SHAPE_ERROR, _describe
from dynarank.measure._forward import Forward, call
from dynarank.measure._ledger import Ledger

Loss = Callable[[Any, Any], Tensor]  # outputs, batch -> a loss

ROOT = "(model)"
OUTSIDE = "(outside of layers)"  # what the loss makes, and states of parameters that are in no layer
PARTS = ("weights", "gradients", "optimizer_state", "activations")
ROWS = 12  # layers that are shown


@dataclass(frozen=True)
class LayerMemory:
    """Bytes of one layer. Tensors that several layers share are the first one's.

    Args:
        name: Qualified name of the module that holds the parameters, or in whose forward pass activations were made.
        weights: Parameters and buffers.
        gradients: Gradients after the backward pass.
        optimizer_state: What the optimizer keeps for the parameters.
        activations: What the forward pass made here and is still alive when the backward pass begins.
    """

    name: str
    weights: int = 0
    gradients: int = 0
    optimizer_state: int = 0
    activations: int = 0

    @property
    def total(self) -> int:
        """All four together."""
        return self.weights + self.gradients + self.optimizer_state + self.activations


@dataclass(frozen=True)
class StepMemory:
    """Bytes of one training step, once the optimizer has its state. ``print(memory)`` shows a table.

    Gradients are cleared before the forward pass. The batch does not count, nor does what a kernel allocates for
    itself.

    Args:
        layers: One entry each, in the order of ``model.named_modules()``.
        forward_peak: The most bytes alive at once in the forward pass: weights, optimizer state, activations.
        backward_peak: The same in the backward pass.
        update_peak: The same in ``optimizer.step()``, where weights and states may exist twice for a while.
    """

    layers: tuple[LayerMemory, ...]
    forward_peak: int
    backward_peak: int
    update_peak: int

    @property
    def weights(self) -> int:
        """Parameters and buffers."""
        return sum(layer.weights for layer in self.layers)

    @property
    def gradients(self) -> int:
        """Gradients after the backward pass."""
        return sum(layer.gradients for layer in self.layers)

    @property
    def optimizer_state(self) -> int:
        """What the optimizer keeps between steps."""
        return sum(layer.optimizer_state for layer in self.layers)

    @property
    def activations(self) -> int:
        """What the forward pass leaves for the backward pass, the loss included."""
        return sum(layer.activations for layer in self.layers)

    @property
    def total(self) -> int:
        """Weights, gradients, optimizer state and activations, as if all were alive at once."""
        return sum(layer.total for layer in self.layers)

    @property
    def update_temporaries(self) -> int:
        """What ``optimizer.step()`` needs above weights, gradients and its state."""
        return self.update_peak - self.weights - self.gradients - self.optimizer_state

    @property
    def peak(self) -> int:
        """The most bytes alive at once."""
        return max(self.forward_peak, self.backward_peak, self.update_peak)

    def as_dict(self) -> dict[str, Any]:
        """Return all numbers as a plain dictionary that JSON can hold."""
        sums = {part: getattr(self, part) for part in (*PARTS, "total", "update_temporaries", "peak")}
        return asdict(self) | sums

    def __str__(self) -> str:
        largest = sorted(self.layers, key=lambda layer: layer.total, reverse=True)[:ROWS]
        shown = [layer for layer in self.layers if layer in largest]
        rows = [("MB", *(part.replace("_", " ") for part in PARTS), "total")]
        rows += [(layer.name, *(_megabytes(getattr(layer, part)) for part in (*PARTS, "total"))) for layer in shown]
        if others := len(self.layers) - len(shown):
            left = [sum(getattr(x, part) for x in self.layers if x not in shown) for part in (*PARTS, "total")]
            rows.append((f"{others} others", *map(_megabytes, left)))
        rows.append(("all", *(_megabytes(getattr(self, part)) for part in (*PARTS, "total"))))
        peaks = {"forward": self.forward_peak, "backward": self.backward_peak, "update": self.update_peak}
        listed = ", ".join(f"{name} {_megabytes(size)}" for name, size in peaks.items())
        return f"{_aligned(rows)}\npeak {_megabytes(self.peak)} MB: {listed}"


def training_memory(
    model: nn.Module, optimizer: torch.optim.Optimizer, batch: Any, *, loss: Loss | None = None, forward: Forward = call
) -> StepMemory:
    """Return the bytes of a training step, by taking two on copies of model and optimizer and measuring the second.

    The model is in the mode that it is in: usually, training. What a step of the optimizer does now and then, such as
    a change of ranks, counts if it is due. To know the bytes before they are there, see ``memory_report``.

    Args:
        model: The model. Neither it nor the optimizer nor the generators are changed; there is memory for a copy.
        optimizer: What trains it, with one gradient a step.
        batch: What ``forward`` takes.
        loss: The loss, given the outputs and the batch. By default the outputs' own ``loss``, or their mean, which
            keeps nothing for the backward pass.
        forward: How a batch enters the model.

    Raises:
        ValueError: The optimizer does not train the model, or takes several gradients; the batch does not fit the
            model; or the loss is no number that can be differentiated.
        TypeError: ``call`` does not know the kind of the batch, or the outputs have no mean.

    Example:
        >>> model = nn.Linear(100, 50, bias=False)
        >>> memory = training_memory(model, torch.optim.AdamW(model.parameters()), torch.zeros(8, 100))
        >>> memory.weights, memory.gradients, memory.optimizer_state, memory.peak > memory.total
        (20000, 20000, 40004, True)
    """
    check_step(model, optimizer)
    model, optimizer, batch = copy.deepcopy((model, optimizer, batch))
    devices = sorted({p.get_device() for p in model.parameters() if p.is_cuda})
    with torch.random.fork_rng(devices=devices), torch.enable_grad():
        return watch_steps(model, optimizer, batch, loss=loss, forward=forward)


def check_step(model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    """Raise unless the optimizer trains parameters of the model, with one gradient a step."""
    kind = type(optimizer).__name__
    if not isinstance(optimizer, torch.optim.Optimizer):
        raise TypeError(f"optimizer must be a torch.optim.Optimizer, got {kind}.")
    own = {id(p) for p in model.parameters()}
    if not any(id(p) in own for group in optimizer.param_groups for p in group["params"]):
        raise ValueError(f"{kind} holds no parameter of the model. Build the optimizer after the model is changed.")
    closure = inspect.signature(optimizer.step).parameters.get("closure")
    needs = closure is not None and closure.default is closure.empty
    if needs or getattr(getattr(optimizer, "integrator", None), "gradients", 1) > 1:
        raise ValueError(
            f"{kind} takes several gradients a step, and memory is counted for one. "
            "Choose an optimizer or an integrator that takes one."
        )


def watch_steps(
    model: nn.Module, optimizer: torch.optim.Optimizer, batch: Any, *, loss: Loss | None, forward: Forward
) -> StepMemory:
    """Take two steps and return the bytes of the second, for which the optimizer has its state.

    Model, optimizer and batch are changed.
    """
    _watch_step(model, optimizer, batch, loss or _own_loss, forward)
    return _watch_step(model, optimizer, batch, loss or _own_loss, forward)


def _watch_step(
    model: nn.Module, optimizer: torch.optim.Optimizer, batch: Any, loss: Loss, forward: Forward
) -> StepMemory:
    model.zero_grad()
    ledger, layers = Ledger(), {name or ROOT: module for name, module in model.named_modules()}
    weights = {name: ledger.hold(_tensors(layer)) for name, layer in layers.items()}
    states = {name: ledger.hold(tensors) for name, tensors in _states(layers, optimizer).items()}
    held, ledger.owner = ledger.books(), OUTSIDE
    with _booking(layers, ledger), ledger:
        value = _compute(model, batch, loss, forward)
        activations = {name: size for name, size in ledger.books().items() if name not in held}
        forward_peak = ledger.take_peak()
        value.backward()
        backward_peak, other = ledger.take_peak(), Ledger()
        gradients = {n: other.hold(p.grad for p in layer.parameters(recurse=False)) for n, layer in layers.items()}
        optimizer.step()
    parts = (weights, gradients, states, activations)
    rows = (LayerMemory(name, *(part.get(name, 0) for part in parts)) for name in (*layers, OUTSIDE))
    return StepMemory(tuple(row for row in rows if row.total), forward_peak, backward_peak, ledger.peak)


def _tensors(module: nn.Module) -> Iterator[Tensor]:
    yield from module.parameters(recurse=False)
    yield from module.buffers(recurse=False)


def _states(layers: Mapping[str, nn.Module], optimizer: torch.optim.Optimizer) -> dict[str, list[Any]]:
    """Return what the optimizer keeps, by the layer that holds the parameter."""
    owners: dict[int, str] = {}
    for name, layer in layers.items():
        for parameter in layer.parameters(recurse=False):
            owners.setdefault(id(parameter), name)
    found: dict[str, list[Any]] = {}
    for parameter, kept in optimizer.state.items():
        found.setdefault(owners.get(id(parameter), OUTSIDE), []).extend(tree_leaves(kept))
    return found


@contextmanager
def _booking(layers: Mapping[str, nn.Module], ledger: Ledger) -> Iterator[None]:
    """Book what is allocated under the innermost layer whose forward pass is running."""
    running = [ledger.owner]

    def enter(name: str) -> Callable[..., None]:
        def note(*_: Any) -> None:
            running.append(name)
            ledger.owner = name

        return note

    def leave(*_: Any) -> None:
        running.pop()
        ledger.owner = running[-1]

    handles = []
    for name, layer in layers.items():
        handles.append(layer.register_forward_pre_hook(enter(name), prepend=True))
        handles.append(layer.register_forward_hook(leave, always_call=True))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _compute(model: nn.Module, batch: Any, loss: Loss, forward: Forward) -> Tensor:
    try:
        outputs = forward(model, batch)
    except (RuntimeError, ValueError, IndexError) as error:
        unfit = SHAPE_ERROR.search(str(error)) or " dim" in str(error)
        if type(error) not in (RuntimeError, ValueError, IndexError) or not unfit:
            raise
        raise ValueError(f"a batch of shape {_describe(batch)} does not fit the model: {error}") from error
    value = loss(outputs, batch)
    if not isinstance(value, Tensor) or value.numel() != 1 or not value.requires_grad:
        shape = tuple(value.shape) if isinstance(value, Tensor) else type(value).__name__
        raise ValueError(f"loss must return a tensor of one number with a gradient, got {shape}.")
    return value


def _own_loss(outputs: Any, batch: Any) -> Tensor:
    own = outputs.get("loss") if isinstance(outputs, Mapping) else getattr(outputs, "loss", None)
    if own is not None:
        return own
    if isinstance(outputs, Tensor) and outputs.is_floating_point():
        return outputs.mean()
    raise TypeError(f"outputs of type {type(outputs).__name__} have no mean; pass loss=lambda outputs, batch: ...")


def _megabytes(size: int) -> str:
    return f"{size / 1e6:,.{3 if 0 < size < 1e6 else 1}f}" if size else "0"


def _aligned(rows: list[tuple[str, ...]]) -> str:
    """Return a table whose numbers stand to the right."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return "\n".join(
        "  ".join(
            [row[0].ljust(widths[0]), *(cell.rjust(width) for cell, width in zip(row[1:], widths[1:], strict=True))]
        )
        for row in rows
    )
