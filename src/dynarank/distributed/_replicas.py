"""The copies of one model on several processes: what they agree on, and how they are kept equal.

Gradients are left to ``DistributedDataParallel``. Two kinds of moments talk beside it: rank events, which every process
holds after the same step, and a few training forward passes, where the copies are compared. No other step
communicates, so that a process which skips a step under ``GradScaler`` leaves nobody waiting.
"""

import logging
import weakref
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import fields, replace
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from dynarank.distributed._channel import OWN, Channel, initialised, open_channel
from dynarank.distributed._equality import (
    check_moments,
    checksum,
    crc,
    layout,
    moment,
    raise_for_layouts,
    relative_distance,
    same,
)
from dynarank.distributed._reducer import check_wrapper, held, pending, rebuilding, unwrap
from dynarank.factors import FactorPair
from dynarank.layers._factored import AbstractFactoredLayer, Point, factored_layers
from dynarank.ranks.base import Decision

logger = logging.getLogger("dynarank")

EARLY = (0, 1, 10, 100)  # steps after the first forward pass at which the copies are compared
PERIOD = 250  # and then every so many steps; after a first difference, in every step
DRIFT, HALF_DRIFT = 1e-3, 5e-2  # relative distance that rounding in one step cannot explain; in half precision
HINT = "pass the DistributedDataParallel wrapper to LowRankOptimizer"

Layers = Mapping[str, AbstractFactoredLayer]


class Driver(Protocol):
    """What moves the copies, seen from here: the optimizer."""

    steps: int
    layers: dict[str, AbstractFactoredLayer]
    state: Any  # under the first parameter of each layer
    seals: Any  # ``hold`` and ``set``: whether the factors are as the optimizer wrote them


def broadcast_factors(model: nn.Module) -> None:
    """Give every process the factors of process 0: ranks, capacities and forms included.

    ``LowRankOptimizer`` does this when it is built. Call it before ``DistributedDataParallel`` where the processes may
    have found different ranks, or where only process 0 has loaded a checkpoint: the wrapper wants equal shapes.

    Args:
        model: The model, wrapped or not. With one process nothing happens.

    Raises:
        RuntimeError: The processes have different low-rank layers, or one cannot change its shape now.
    """
    Replicas(model)


class Replicas:
    """The copies of one model on the processes of a data-parallel run; they start with the factors of process 0.

    Args:
        model: The model, in its ``DistributedDataParallel`` wrapper if it has one. Under an initialised process
            group a bare model is taken for a copy as well, whose gradients the caller averages; see ``independent``.

    Raises:
        RuntimeError: As ``broadcast_factors``, or the wrapper cannot follow a change of shape.
    """

    def __init__(self, model: nn.Module) -> None:
        self.module, self.wrapper = unwrap(model)
        if self.wrapper is not None:
            check_wrapper(self.wrapper)
        layers = factored_layers(self.module)
        sharded = any(hasattr(p, "device_mesh") for layer in layers.values() for p in layer.parameters())
        group = self.wrapper.process_group if self.wrapper is not None else None
        self._channel = open_channel(group) if layers and not sharded else None
        self._driver: Callable[[], Driver | None] = _nobody
        self._first: int | None = None  # steps at the first comparison, and at the last
        self._compared: int | None = None
        self._every_step = False
        if self._channel is not None:
            _broadcast(layers, self._channel, self.wrapper)

    @property
    def processes(self) -> int:
        """Number of processes that hold a copy."""
        return self._channel.processes if self._channel is not None else 1

    def set_wrapper(self, wrapper: DistributedDataParallel) -> None:
        """Take note of a wrapper that was put around the model after the optimizer was built.

        Raises:
            TypeError: There is no ``DistributedDataParallel``.
            ValueError: It holds another model.
        """
        module, found = unwrap(wrapper)
        if found is None:
            raise TypeError(f"wrapper must be a DistributedDataParallel, got {type(wrapper).__name__}.")
        if module is not self.module:
            raise ValueError("the wrapper holds another model than the one that the optimizer drives.")
        check_wrapper(found)
        self.wrapper = found
        self._hook()

    def __reduce__(self) -> Any:
        return _alone, (self.module,)  # a copied or pickled optimizer talks to nobody

    # --- rank events ---------------------------------------------------------------------------------------------

    def agree(self, plan: Mapping[str, Decision], *, step: int) -> dict[str, Decision]:
        """Return the plan of process 0.

        Raises:
            RuntimeError: The processes are at different steps or have different layers.
        """
        if self._channel is None:
            return dict(plan)
        where = f"rank event at step {step}"
        check_moments(self._channel, where, self._channel.gather(where, moment(step, plan)), plan)
        numbers = torch.tensor([(d.rank, d.candidates) for d in plan.values()], dtype=torch.int64)  # (layers, 2)
        self._channel.copy_from_main(where, [numbers])
        agreed = {}
        for (name, mine), (rank, candidates) in zip(plan.items(), numbers.tolist(), strict=True):
            equal = (mine.rank, mine.candidates) == (rank, candidates)
            agreed[name] = mine if equal else replace(mine, rank=rank, candidates=candidates, reason="as on process 0")
        return agreed

    @contextmanager
    def resizing(self, layers: Layers) -> Iterator[str | None]:
        """Let go of the wrapper's reducer while these layers change their shape, and rebuild it afterwards.

        Yields why they cannot change it now, or None: the same on every process, since one copy may be held by an
        output that the others have dropped. Without layers nothing is touched and nobody is asked.
        """
        if not layers:
            yield None
            return
        reason = None if self.wrapper is None else self._agreed_reason(pending(self.wrapper))
        if reason is not None:
            yield reason
            return
        with rebuilding(self.wrapper):
            yield self._agreed_reason(held(layers))

    @contextmanager
    def replacing(self, targets: Mapping[str, tuple[AbstractFactoredLayer, Point]]) -> Iterator[None]:
        """Rebuild the reducer around a step in which layers take new parameters, as a change of form does.

        Args:
            targets: Layers and where they go.

        Raises:
            RuntimeError: A wrapper or a pending backward pass would go on with the old parameters.
        """
        layers = {name: layer for name, (layer, point) in targets.items() if _takes_new_parameters(layer, point)}
        reason = None
        if layers and self.wrapper is not None:
            reason = pending(self.wrapper)
        elif layers and initialised():
            reason = held(layers)
        if reason is not None:
            raise RuntimeError(f"the form of {', '.join(layers)} cannot change now: {self._hinted(reason)}.")
        with rebuilding(self.wrapper if layers else None):
            yield

    def _agreed_reason(self, reason: str | None) -> str | None:
        if self._channel is not None:
            told = self._channel.gather_objects("change of capacity", reason)
            process = next((p for p, r in enumerate(told) if r is not None), None)
            if process is not None:
                reason = told[process] if None not in told else f"{told[process]} on process {process}"
        return self._hinted(reason)

    def _hinted(self, reason: str | None) -> str | None:
        return f"{reason}; {HINT}" if reason and self.wrapper is None and initialised() else reason

    # --- equality ------------------------------------------------------------------------------------------------

    def watch(self, driver: Driver) -> None:
        """Compare the copies at some of the coming training forward passes of the wrapper.

        Not of a bare model: process 0 may run one by itself, to look at an output.
        """
        self._driver = weakref.ref(driver)
        self._hook()

    def _hook(self) -> None:
        if self._channel is not None and self.wrapper is not None and self._driver() is not None:
            self.wrapper.register_forward_pre_hook(_ForwardCheck(self))

    def at_forward(self) -> None:
        """Compare the copies if it is time; called before each forward pass of the wrapper."""
        driver, wrapper = self._driver(), self.wrapper
        if driver is None or wrapper is None or not wrapper.training or not wrapper.require_backward_grad_sync:
            return  # under no_sync() the processes need not keep pace
        if not torch.is_grad_enabled() or torch.compiler.is_compiling():
            return
        self._first = driver.steps if self._first is None else self._first
        since = driver.steps - self._first
        if driver.steps != self._compared and (self._every_step or since in EARLY or since % PERIOD == 0):
            self.compare(driver)

    def compare(self, driver: Driver) -> None:
        """Compare factors and state between the processes; where they differ, take those of process 0.

        Raises:
            RuntimeError: Steps, layers, ranks, forms or state shapes differ, or the weights have come apart by more
                than rounding within one step.
        """
        if self._channel is None:
            return
        where = f"comparison at step {driver.steps}"
        parts = {name: _parts(driver, layer) for name, layer in driver.layers.items()}
        layouts = {name: layout(driver.layers[name], tensors) for name, tensors in parts.items()}
        check = checksum(tensor for tensors in parts.values() for tensor in tensors)
        header = [*moment(driver.steps, driver.layers), crc(layouts.values()), check]
        rows = self._channel.gather(where, header)
        check_moments(self._channel, where, rows, driver.layers)
        if not same(rows[:, 2]):
            raise_for_layouts(self._channel, where, layouts)
        if not same(rows[:, 3]):
            self._repair(driver, parts, self._channel)
        self._compared = driver.steps

    def _repair(self, driver: Driver, parts: Mapping[str, list[Tensor]], channel: Channel) -> None:
        """Copy factors and momentum from process 0, and from now on compare in every step."""
        where = f"repair at step {driver.steps}"
        sealed = torch.tensor([driver.seals.hold(name, layer) for name, layer in driver.layers.items()])
        channel.copy_from_main(where, [sealed])
        drift = excess = 0.0
        for seal, (name, layer) in zip(sealed.tolist(), driver.layers.items(), strict=True):
            before = _copy(layer.point())
            channel.copy_from_main(where, parts[name])
            distance = relative_distance(before, layer.point())
            wide = parts[name][0].dtype in (torch.float32, torch.float64)
            drift, excess = max(drift, distance), max(excess, distance / (DRIFT if wide else HALF_DRIFT))
            if seal and not channel.is_main:
                driver.seals.set(name, layer)
        drift, excess = channel.gather(where, [drift, excess], dtype=torch.float64).amax(dim=0).tolist()
        soon = self._compared is None or driver.steps - self._compared <= 1
        if excess > 1 and (soon or self.wrapper is None):
            raise RuntimeError(
                f"the copies of the model differ by {drift:.1%} at step {driver.steps}, which rounding does not "
                "explain. Every process must load the same checkpoint and see the same averaged gradients: wrap the "
                f"model in DistributedDataParallel and leave no_sync() for the last backward pass of a step. {OWN}"
            )
        if not self._every_step:
            logger.warning(
                "the copies of the model differed by %.1e at step %d: the processes round differently. Factors and "
                "momentum were copied from process 0, and from now on they are compared in every step.",
                drift,
                driver.steps,
            )
        self._every_step = True


class _ForwardCheck:
    """The forward pre-hook. Copies of the module, and pickled ones, carry one that does nothing."""

    def __init__(self, replicas: Replicas | None = None) -> None:
        self._replicas: Callable[[], Replicas | None] = _nobody if replicas is None else weakref.ref(replicas)

    def __call__(self, module: nn.Module, args: Any) -> None:
        if (replicas := self._replicas()) is not None:
            replicas.at_forward()

    def __reduce__(self) -> Any:
        return _ForwardCheck, ()


def _nobody() -> None:
    return None


def _alone(module: nn.Module) -> Replicas:
    replicas = Replicas(nn.Identity())
    replicas.module = module
    return replicas


@torch.no_grad()
def _broadcast(layers: Layers, channel: Channel, wrapper: DistributedDataParallel | None) -> None:
    where = "broadcast of the factors"
    check_moments(channel, where, channel.gather(where, moment(0, layers)), layers)
    mine = [{key: tuple(t.shape) for key, t in _weights(layer).items()} for layer in layers.values()]
    told = channel.gather_objects(where, mine)
    with rebuilding(wrapper if any(shapes != told[0] for shapes in told) else None):
        for layer, shapes in zip(layers.values(), told[0], strict=True):
            _receive(layer, channel, where, shapes)


def _receive(layer: AbstractFactoredLayer, channel: Channel, where: str, shapes: Mapping[str, tuple[int, ...]]) -> None:
    own = _weights(layer)
    like = next(iter(own.values()))
    tensors = {key: own[key] if channel.is_main else like.new_empty(shape) for key, shape in shapes.items()}
    channel.copy_from_main(where, tensors.values())
    if not channel.is_main:
        layer.load_state_dict(tensors, strict=False)  # takes over ranks, capacities and form


def _weights(layer: AbstractFactoredLayer) -> dict[str, Tensor]:
    """Return the tensors that make up the weight by name, parameters first."""
    names = (*layer.factor_names, *layer.basis_names)
    held = layer._parameters | layer._buffers
    return {name: tensor.detach() for name in names if (tensor := held.get(name)) is not None}


def _parts(driver: Driver, layer: AbstractFactoredLayer) -> list[Tensor]:
    """Return the layer's factors and then its state, in an order that is the same on every process."""
    first = next(p for name in layer.factor_names if (p := layer._parameters.get(name)) is not None)
    state = driver.state.get(first, {})
    return [t.detach() for t in (*_weights(layer).values(), *(state[key] for key in sorted(state)))]


def _copy(point: Point) -> Point:
    return type(point)(*(getattr(point, field.name).clone() for field in fields(point)))


def _takes_new_parameters(layer: AbstractFactoredLayer, point: Point) -> bool:
    if isinstance(point, FactorPair):
        return layer.form == "core" or point.rank > layer.capacity
    core: Any = layer._parameters.get("S")
    return core is None or core.shape != point.S.shape
