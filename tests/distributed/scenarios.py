"""What the processes do: functions that each of them runs with the same arguments, and a lone process too."""

import copy
import logging
import pickle
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from dynarank.distributed import broadcast_factors, independent, is_main_process, world
from dynarank.distributed._reducer import PRIVATE, check_wrapper
from dynarank.integrators.augmented_bug import AugmentedBUG
from dynarank.integrators.base import AbstractIntegrator
from dynarank.integrators.tangent_muon import TangentMuon
from dynarank.layers.conv2d_tucker import LowRankTuckerConv2d
from dynarank.layers.linear import LowRankLinear
from dynarank.optim.low_rank_optimizer import LowRankOptimizer
from dynarank.ranks.base import AbstractRankPolicy, Decision, LayerSpectrum, PlanContext
from dynarank.schedules.periodic import Periodic

SHORT_CYCLE = AugmentedBUG(coefficient_steps=3)
# Growth, truncation within what was grown, truncation below the start, growth again: the capacity changes each time.
SCRIPT = ((3, 2), (4, 0), (2, 1), (3, 3))


@dataclass(frozen=True)
class Script(AbstractRankPolicy):
    """Follows a list of ranks and candidates, the same for all layers.

    Args:
        plans: Rank and candidates of each event; the last one is repeated.
        every: Steps between events.
        unequal: Whether the processes want different ranks.
    """

    plans: tuple[tuple[int, int], ...]
    every: int
    unequal: bool = False

    def plan(self, spectra: Sequence[LayerSpectrum], context: PlanContext) -> list[Decision]:
        rank, candidates = self.plans[min(context.step // self.every, len(self.plans)) - 1]
        more = 0 if is_main_process() or not self.unequal else 1
        return [Decision(min(rank + more, len(s.sigma)), candidates + more, "as told") for s in spectra]


class Doubled(nn.Module):
    """Scales by a buffer and, on demand, leaves a parameter unused."""

    def __init__(self, size: int) -> None:
        super().__init__()
        self.register_buffer("scale", torch.full((size,), 2.0))
        self.unused = nn.Parameter(torch.zeros(size))

    def forward(self, x: Tensor) -> Tensor:
        return x * self.scale


def make_model(*, dtype: torch.dtype, rank: int = 3, seed: int = 0, unused: bool = False, **options: Any) -> Any:
    torch.manual_seed(seed)
    if options.pop("tucker", False):
        conv = LowRankTuckerConv2d(3, 10, 2, padding=1, ranks=(3, 2), **options)
        return nn.Sequential(nn.Unflatten(1, (3, 2, 2)), conv, nn.Flatten(), nn.Linear(90, 8)).to(dtype)
    model = nn.Sequential(
        LowRankLinear(12, 20, rank=rank, **options),
        nn.Tanh(),
        LowRankLinear(20, 9, rank=rank, **options),
        Doubled(9),
        nn.Linear(9, 8),  # as many outputs as ranks: arbitrary completions of a basis would amplify rounding
    ).to(dtype)
    model[3].unused.requires_grad_(unused)
    return model


def make_batch(step: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """The global batch of a step: inputs ``(16, 12)`` and targets ``(16, 8)``."""
    generator = torch.Generator().manual_seed(1000 + step)
    x = torch.randn(16, 12, generator=generator, dtype=torch.float64)
    return x.to(dtype), (x[:, :8] * x[:, 4:].roll(1, 1)).sin().to(dtype)


def share(tensor: Tensor) -> Tensor:
    """This process's part of a global batch."""
    return tensor[dist.get_rank() :: world()] if world() > 1 else tensor


def wrap(model: nn.Module, **ddp: Any) -> Any:
    return DistributedDataParallel(model, **ddp) if dist.is_initialized() else model


def inner(model: Any) -> Any:
    return model.module if isinstance(model, DistributedDataParallel) else model


def bits(model: nn.Module) -> list[Tensor]:
    return [t.detach().clone() for t in model.state_dict().values()]


def layer_ranks(model: nn.Module) -> list[int]:
    return [rank for m in model.modules() for rank in getattr(m, "all_ranks", ())]


def weights(model: Any) -> list[Tensor]:
    """Every weight, factors multiplied out."""
    low_rank: Any = [m.weight.detach().as_subclass(Tensor) for m in model.modules() if hasattr(m, "all_ranks")]
    return [t.clone() for t in (*low_rank, model[-1].weight.detach(), model[-1].bias.detach())]


@contextmanager
def overheard() -> Iterator[list[str]]:
    """Collect what the library logs."""
    heard: list[str] = []
    handler = logging.Handler(logging.WARNING)
    handler.emit = lambda record: heard.append(record.getMessage())  # type: ignore[method-assign]
    logger = logging.getLogger("dynarank")
    logger.addHandler(handler)
    try:
        yield heard
    finally:
        logger.removeHandler(handler)


def complaint(call: Callable[[], Any]) -> str:
    """Return the message of the RuntimeError that a call ends with."""
    try:
        call()
    except RuntimeError as error:
        return str(error)
    return ""


class Loop:
    """The user's own training loop, with everything a user may put into one.

    Args:
        model: A model wrapped already; by default one is made from ``dtype`` and ``model_options``.
        dtype: Of the model and the data.
        integrator: Name of the integrator.
        every: Steps between rank events.
        unequal: Whether the processes plan different ranks.
        micro_batches: Into how many parts a batch is cut; all but the last run under ``no_sync``.
        clip: Largest gradient norm, or None.
        scaler: Whether to scale the loss.
        one_cycle: Number of steps of a ``OneCycleLR``, or None.
        overflow: Step at which the last process alone sees an infinite input in its first micro-batch.
        keep: Step whose output process 0 keeps as a graph that is never run backward.
        peek: Whether process 0 alone runs a forward pass in training mode after each step.
        wrapped: Whether the optimizer is given the wrapper, or ``"later"``.
        ddp: Options of the wrapper.
    """

    def __init__(
        self,
        *,
        model: Any = None,
        dtype: torch.dtype = torch.float64,
        integrator: str | AbstractIntegrator = "tangent_muon",
        every: int = 5,
        unequal: bool = False,
        micro_batches: int = 1,
        clip: float | None = None,
        scaler: bool = False,
        one_cycle: int | None = None,
        overflow: int | None = None,
        keep: int | None = None,
        peek: bool = False,
        wrapped: bool | str = True,
        ddp: dict[str, Any] | None = None,
        **model_options: Any,
    ) -> None:
        self.dtype, self.micro_batches, self.clip, self.overflow, self.keep = dtype, micro_batches, clip, overflow, keep
        self.peek = peek
        self.model = model or wrap(make_model(dtype=dtype, **model_options), **(ddp or {}))
        self.optimizer = LowRankOptimizer(
            self.model if wrapped is True else inner(self.model),
            lr=0.02,
            integrator=SHORT_CYCLE if integrator == "augmented_bug" else integrator,
            rank_policy=Script(SCRIPT, every, unequal),
            schedule=Periodic(every=every),
            base_options={"lr": 1e-2},
        )
        if wrapped == "later" and dist.is_initialized():
            self.optimizer.replicas.set_wrapper(self.model)
        self.scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10, enabled=scaler)
        self.scheduler = None
        if one_cycle is not None:
            self.scheduler = torch.optim.lr_scheduler.OneCycleLR(self.optimizer, [0.05, 0.02], total_steps=one_cycle)
        self.kept: Any = None
        self.events: list[Any] = []
        self.trace: list[list[Tensor]] = []
        self.ranks: list[list[int]] = []
        self.optimizer.on_rank_event(self.events.extend)

    def run(self, steps: range) -> dict[str, Any]:
        with overheard() as heard:
            for step in steps:
                self._step(step)
                self.trace.append(bits(inner(self.model)))
                self.ranks.append(layer_ranks(inner(self.model)))
        return {
            "weights": weights(inner(self.model)),
            "trace": self.trace,
            "ranks": self.ranks,
            "capacities": [n for m in self.model.modules() for n in getattr(m, "all_capacities", ())],
            "events": [(e.step, e.layer, e.new_rank, e.candidates, e.reason) for e in self.events],
            "steps": self.optimizer.steps,
            "scale": self.scaler.get_scale(),
            "heard": heard,
            "layers": list(self.optimizer.layers),
        }

    def _step(self, step: int) -> None:
        self.optimizer.zero_grad()
        parts = list(zip(*(t.chunk(self.micro_batches) for t in make_batch(step, self.dtype)), strict=True))
        for index, (x, y) in enumerate(parts):
            x, y = share(x).clone(), share(y)
            if step == self.overflow and index == 0 and (world() == 1 or not is_main_process()):
                x[-1] = torch.inf
            last = index == len(parts) - 1
            with nullcontext() if last or world() == 1 else self.model.no_sync():
                loss = nn.functional.mse_loss(self.model(x), y) / len(parts)
                self.scaler.scale(loss).backward()
        if step == self.keep and is_main_process():
            self.kept = inner(self.model)(x)
        self.scaler.unscale_(self.optimizer)
        if self.clip is not None:
            nn.utils.clip_grad_norm_(self.model.parameters(), self.clip)
        self.scaler.step(self.optimizer)
        self.scaler.update()
        if self.scheduler is not None:
            self.scheduler.step()
        if self.peek and is_main_process():
            inner(self.model)(x)


def train(*, steps: int = 22, freeze: bool = False, **options: Any) -> dict[str, Any]:
    """Train and return weights, ranks and all parameters after each step."""
    loop = Loop(**options)
    if freeze:
        loop.run(range(steps - 2))
        loop.optimizer.freeze_ranks()
        return loop.run(range(steps - 2, steps))
    return loop.run(range(steps))


def hooked(*, steps: int = 12, **options: Any) -> dict[str, Any]:
    """Train with a communication hook that counts its calls."""
    calls = [0]

    def average(state: list[int], bucket: dist.GradBucket) -> torch.futures.Future[Tensor]:
        state[0] += 1
        work: Any = dist.all_reduce(bucket.buffer().div_(world()), async_op=True)
        return work.get_future().then(lambda done: done.value()[0])

    loop = Loop(**options)
    loop.model.register_comm_hook(calls, average)
    loop.run(range(steps // 2))
    before = calls[0]
    return {**loop.run(range(steps // 2, steps)), "before": before, "calls": calls[0]}


def resume(*, folder: str, integrator: str, broadcast: bool = False) -> dict[str, Any]:
    """Save on process 0 in the middle of a run, go on; then start anew from the files and go on to the same step."""
    file = f"{folder}/{integrator}.pt"
    loop = Loop(integrator=integrator)
    loop.run(range(13))
    if is_main_process():
        torch.save({"model": inner(loop.model).state_dict(), "optimizer": loop.optimizer.state_dict()}, file)
    dist.barrier()
    whole = loop.run(range(13, 22))
    saved = torch.load(file, weights_only=True)
    model = make_model(dtype=torch.float64, seed=1)
    if is_main_process() or not broadcast:
        model.load_state_dict(saved["model"])
    if broadcast:
        broadcast_factors(model)
    again = Loop(model=wrap(model), integrator=integrator)
    again.optimizer.load_state_dict(saved["optimizer"])
    return {"whole": whole["weights"], "resumed": again.run(range(13, 22))["weights"]}


def different_ranks() -> dict[str, Any]:
    """Each process starts with other weights, ranks and forms."""
    process = dist.get_rank()
    model = make_model(dtype=torch.float64, rank=3 + process, seed=process, rank_multiple=1 + process)
    if is_main_process():
        model[2].set_factors(model[2].factors(), form="core")
    broadcast_factors(model)
    low_rank = [m for m in model if isinstance(m, LowRankLinear)]
    factors = [t.detach().clone() for m in low_rank for t in (m.A, m.B, m.S, m.U, m.V) if t is not None]
    return {"ranks": layer_ranks(model), "forms": [m.form for m in low_rank], "bits": factors}


def different_layers() -> str:
    """Process 1 has no second low-rank layer."""
    model = make_model(dtype=torch.float64)
    if not is_main_process():
        model[2] = nn.Linear(20, 9, dtype=torch.float64)
    return complaint(lambda: LowRankOptimizer(model))


def own_models() -> dict[str, Any]:
    """Each process trains a model of its own; only process 0 changes ranks."""
    with independent():
        model = make_model(dtype=torch.float64, seed=dist.get_rank(), rank=2 + dist.get_rank())
        loop = Loop(model=model, wrapped=False, every=5 if is_main_process() else 1000)
    return loop.run(range(7))


def different_steps() -> str:
    """Process 1 believes it is one step further when the ranks freeze."""
    loop = Loop(every=1000)
    loop.run(range(3))
    loop.optimizer.steps += dist.get_rank()
    return complaint(loop.optimizer.freeze_ranks)


def different_checkpoints() -> str:
    """Process 1 has loaded other weights after the model was wrapped."""
    loop = Loop()
    if not is_main_process():
        inner(loop.model).load_state_dict(make_model(dtype=torch.float64, seed=1).state_dict())
    return complaint(lambda: loop.run(range(2)))


def lone_step() -> None:
    """Process 1 leaves out a step, so that process 0 holds a rank event alone."""
    loop = Loop(every=5)
    loop.run(range(4))
    if not is_main_process():
        loop.optimizer.step = lambda *_: None  # type: ignore[method-assign]
    loop.run(range(4, 6))


def pending_backward() -> str:
    """A second forward pass waits for its backward pass when the form changes."""
    loop = Loop(integrator="augmented_bug")
    loop.run(range(1))  # now in the core form, for three coefficient steps
    loop.run(range(1, 3))
    waiting = loop.model(share(make_batch(0, torch.float64)[0])).sum()
    ranks = layer_ranks(inner(loop.model))
    message = complaint(loop.optimizer.step)
    waiting.backward()  # nothing was touched: it still goes through the reducer
    assert layer_ranks(inner(loop.model)) == ranks
    return message


class Noisy(TangentMuon):
    """Rounds differently on each process, as other hardware does."""

    def advance(self, point: Any, gradient: Any, state: Any, **options: Any) -> Any:
        new, state = super().advance(point, gradient, state, **options)
        if not is_main_process():
            new = type(new)(new.A * (1 + 1e-6), new.B)
        return new, state


def rounding(*, steps: int = 22) -> dict[str, Any]:
    """Train on processes that round differently; the trace is taken after the forward pass that compares."""
    loop = Loop(integrator=Noisy())
    seen: list[list[Tensor]] = []
    inner(loop.model)[0].register_forward_pre_hook(lambda *_: seen.append(bits(inner(loop.model))))
    return {**loop.run(range(steps)), "seen": seen}


def copies() -> bool:
    """Copy and pickle the model and the optimizer of a distributed run."""
    loop = Loop()
    loop.run(range(2))
    twin = copy.deepcopy(inner(loop.model))
    pickle.loads(pickle.dumps(inner(loop.model)))
    optimizer = copy.deepcopy(loop.optimizer)
    if is_main_process():  # alone: the copy of the hook must not ask anybody
        twin(make_batch(0, torch.float64)[0]).sum().backward()
        optimizer.model(make_batch(0, torch.float64)[0]).sum().backward()
        optimizer.step()
    loop.run(range(2, 4))
    return True


def private_parts() -> dict[str, Any]:
    """What the rebuilding of the reducer leans on."""
    wrapper = wrap(make_model(dtype=torch.float64))
    present = {name: hasattr(wrapper, name) for name in PRIVATE}
    check_wrapper(wrapper)
    counts = {p._use_count() for p in wrapper.parameters() if p.requires_grad}
    del wrapper._comm_hooks
    return {"present": present, "counts": len(counts), "error": complaint(lambda: LowRankOptimizer(wrapper))}
