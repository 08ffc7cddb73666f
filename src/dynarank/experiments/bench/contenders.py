"""What is compared within a series: dense networks, plain training of two factors, and integrators."""

from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, nullcontext
from time import process_time
from typing import Any, final

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from dynarank.experiments.bench.cases.base import Series
from dynarank.factorize import factorize_
from dynarank.integrators.base import AbstractIntegrator
from dynarank.layers._factored import factored_layers
from dynarank.measure import flops, peak_memory
from dynarank.optim.low_rank_optimizer import LowRankOptimizer
from dynarank.optim.steps import take_step
from dynarank.ranks.fixed import Fixed

# The part of a usual learning rate that is used: what counts is the time of a step, not where it goes.
STILL = 1e-3
SGD: dict[str, Any] = {"lr": STILL * 0.1, "momentum": 0.9, "nesterov": True}

Make = Callable[[nn.Module], torch.optim.Optimizer]


@final
class Contender:
    """A network with its optimizer and the batch that it is trained on, again and again.

    Args:
        model: The network, on its device.
        make: Makes what trains it.
        series: Batch and loss.
        batch: The inputs, on that device.
    """

    def __init__(self, model: nn.Module, make: Make, series: Series, batch: Tensor) -> None:
        self.model, self.series = model.train(), series
        self.batch = batch.detach().requires_grad_(series.inner)
        self._make = make
        self.optimizer: torch.optim.Optimizer = make(model)
        self.updates: list[float] = []  # CPU seconds a step that the update took, block by block

    @property
    def in_cycles(self) -> bool:
        """Whether some steps do more than others, so that a measurement has to hold whole cycles."""
        return isinstance(self.optimizer, LowRankOptimizer)

    def block(self, steps: int) -> None:
        """Take steps one after the other: zero_grad, forward, loss, backward, update."""
        self._updating = 0.0
        for _ in range(steps):
            self._step()
        self.updates.append(self._updating / steps)

    def _step(self) -> None:
        took = 0.0

        def closure() -> Tensor:
            nonlocal began, took
            paused = process_time()
            self.optimizer.zero_grad()
            self.batch.grad = None
            loss = self._loss(self.model, self.batch)
            loss.backward()
            began, took = process_time(), took + (paused - began)
            return loss

        began = process_time()
        take_step(self.optimizer, closure)
        self._updating += took + process_time() - began

    def _loss(self, model: nn.Module, batch: Tensor) -> Tensor:
        with half_precision(batch.device):
            return self.series.loss(model(batch))

    def operations(self) -> int:
        """Return the FLOPs of a forward and a backward pass, of which the products and convolutions count."""

        @torch.enable_grad()
        def forward(model: nn.Module, batch: Tensor) -> None:
            self._loss(model, batch.requires_grad_(self.series.inner)).backward()
            model.zero_grad()

        return flops(self.model, self.batch.detach(), forward=forward)

    def memory(self, steps: int) -> dict[str, int]:
        """Return the most bytes that tensors hold at once in ``steps`` steps, and those that stay between two of them.

        The steps begin with a new optimizer, so that its state counts; this one is no longer of use afterwards. The
        batch does not count, but its gradient does.
        """
        del self.optimizer
        self.model.zero_grad()
        stays: dict[str, int] = {}

        @torch.enable_grad()
        def forward(model: nn.Module, batch: Tensor) -> None:
            model.train()
            self.optimizer = self._make(model)
            self.block(steps)
            stays["parameters"] = bytes_of(model.parameters())
            stays["gradients"] = bytes_of(p.grad for p in model.parameters() if p.grad is not None)
            stays["state"] = bytes_of(_state(self.optimizer))
            del self.optimizer
            model.zero_grad()

        return {"peak": peak_memory(self.model, self.batch, forward=forward), **stays}


def _state(optimizer: torch.optim.Optimizer) -> Iterator[Tensor]:
    base = getattr(optimizer, "base", None)  # of a LowRankOptimizer with parameters that are no factors
    for kept in (optimizer.state, base.state if base is not None else {}):
        yield from (leaf for leaf in tree_leaves(list(map(dict, kept.values()))) if isinstance(leaf, Tensor))


def half_precision(device: torch.device) -> AbstractContextManager[Any]:
    """Return autocast to bfloat16 on a GPU, and a context that does nothing elsewhere."""
    return torch.autocast("cuda", torch.bfloat16) if device.type == "cuda" else nullcontext()


def bytes_of(tensors: Any) -> int:
    """Return the bytes of tensors, each storage once.

    Example:
        >>> x = torch.zeros(3, 5)
        >>> bytes_of([x, x.mT, torch.zeros(2)])
        68
    """
    storages = {tensor.untyped_storage()._cdata: tensor.untyped_storage().nbytes() for tensor in tensors}
    return sum(storages.values())


# --- how they are made -----------------------------------------------------------------------------------------------


def make_batch(series: Series, device: torch.device) -> Tensor:
    """Return random inputs of the series."""
    return laid_out(torch.randn(series.inputs).to(device), series)


def laid_out(batch: Tensor, series: Series) -> Tensor:
    """Return a batch in the memory format of the series."""
    return batch.contiguous(memory_format=torch.channels_last) if series.channels_last else batch


def by_sgd(model: nn.Module) -> torch.optim.Optimizer:
    """Return SGD with Nesterov momentum on every parameter: for dense networks, and for plain factors."""
    return torch.optim.SGD(model.parameters(), **SGD)


def by_integrator(integrator: AbstractIntegrator) -> Make:
    """Return what makes the optimizer that moves low-rank layers at frozen ranks, and everything else by SGD."""

    def make(model: nn.Module) -> LowRankOptimizer:
        lr = STILL * integrator.typical_lr
        base: Any = {"base": torch.optim.SGD, "base_options": SGD}
        optimizer = LowRankOptimizer(model, lr=lr, integrator=integrator, rank_policy=Fixed(), **base)
        optimizer.freeze_ranks()
        return optimizer

    return make


@torch.no_grad()
def low_rank(series: Series, ranks: Mapping[str, int], like: nn.Module, device: torch.device) -> nn.Module:
    """Return the network with layers of these ranks: random factors, since truncating wide weights takes minutes.

    Everything that stays dense is copied from ``like``.

    Raises:
        ValueError: There is no such layer, or a rank is out of range.
    """
    with torch.device("meta"):
        model = series.network()
    factorize_(model, target_modules=list(ranks), rank_pattern=dict(ranks), keep_dense_above_break_even=False)
    model.to_empty(device=device)
    known = {**dict(like.named_parameters()), **dict(like.named_buffers())}
    for name, tensor in (*model.named_parameters(), *model.named_buffers()):
        if name in known:
            tensor.copy_(known[name])
    for layer in factored_layers(model).values():
        layer.randomise_(layer.all_ranks)
    return placed(model, series, device)


def placed(model: nn.Module, series: Series, device: torch.device) -> nn.Module:
    """Return the network on its device and in its memory format."""
    model = model.to(device)
    return model.to(memory_format=torch.channels_last) if series.channels_last else model  # type: ignore[call-overload]
