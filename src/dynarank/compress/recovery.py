"""Getting back what truncation has cost: fine-tuning on the manifold, alone or towards the network before."""

import math
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.lr_scheduler import LambdaLR

from dynarank.compress.distillation import Distance, SoftTargets
from dynarank.errors import NonFiniteGradientError
from dynarank.factorize.sites import TUCKER, Selector, choose_sites
from dynarank.integrators.base import AbstractIntegrator
from dynarank.layers._factored import factored_layers
from dynarank.layers.base import low_rank_layers
from dynarank.measure import Forward, call
from dynarank.optim.low_rank_optimizer import LowRankOptimizer
from dynarank.optim.steps import take_step
from dynarank.ranks.base import AbstractRankPolicy
from dynarank.schedules.base import AbstractSchedule
from dynarank.schedules.periodic import Periodic

CORE = "core"


@dataclass(frozen=True)
class Recovery:
    """How a recovery went.

    Args:
        steps: Optimizer steps taken.
        seconds: Seconds of training.
        first_loss: Mean loss of the first tenth of the steps.
        last_loss: Mean loss of the last tenth.
        ranks_before: Rank of each low-rank layer before.
        ranks_after: The same afterwards.
        trained: Numbers that were trained.
    """

    steps: int
    seconds: float
    first_loss: float
    last_loss: float
    ranks_before: Mapping[str, int]
    ranks_after: Mapping[str, int]
    trained: int

    def as_dict(self) -> dict[str, Any]:
        """Return the outcome as a plain dictionary that JSON can hold."""
        return asdict(self)

    def __str__(self) -> str:
        moved = sum(self.ranks_before[name] != rank for name, rank in self.ranks_after.items())
        return (
            f"{self.steps} steps in {self.seconds:.0f} s on {self.trained:,} numbers: loss {self.first_loss:.4f} to "
            f"{self.last_loss:.4f}; the ranks of {moved} of {len(self.ranks_after)} layers moved."
        )


def recover_(
    model: nn.Module,
    batches: Iterable[Any],
    loss: Callable[[Any, Any], Tensor] | None = None,
    *,
    steps: int,
    teacher: nn.Module | None = None,
    distance: Distance | None = None,
    teacher_weight: float = 1.0,
    lr: float = 0.01,
    integrator: str | AbstractIntegrator = "tangent_muon",
    rank_policy: str | AbstractRankPolicy = "fixed",
    schedule: str | AbstractSchedule | None = None,
    base: type[torch.optim.Optimizer] = torch.optim.AdamW,
    base_options: Mapping[str, Any] | None = None,
    only: Selector = None,
    forward: Forward = call,
    tell: Callable[[int, int, float], None] | None = None,
) -> Recovery:
    """Train a compressed model in place for a number of steps; learning rates rise shortly and fall along a cosine.

    In a loop of your own, the same is a ``LowRankOptimizer``, a loss, and `training_only` where memory is short.

    Args:
        model: A model with low-rank layers. It is left in the mode it was in.
        batches: Training batches: any iterable; one that ends, such as a ``DataLoader``, is gone through again.
        loss: The loss, given the outputs and the batch. Optional with a teacher.
        steps: Optimizer steps.
        teacher: The network before, or any other that takes the same batches; it is not changed.
        distance: Loss between the outputs of model and teacher; by default `SoftTargets`, for logits.
        teacher_weight: Weight of that loss beside ``loss``.
        lr: Largest learning rate of the factors, in the convention of the integrator. Try a smaller one
            where little was lost.
        integrator: How weights move along the manifold.
        rank_policy: How ranks change meanwhile: by default not at all. `Budget` moves rank between layers.
        schedule: When ranks change; by default 10 times in the first half.
        base: Optimizer of all other parameters.
        base_options: Its options; ``{"lr": 1e-3}`` by default.
        only: ``"core"`` trains the small cores between frozen bases, and biases and norms; names of layers, as in
            ``target_modules``, train those layers alone. None for everything.
        forward: How a batch goes through the model.
        tell: Called every 50 steps with the step, the number of steps and the mean loss since the last call.

    Raises:
        ValueError: There is neither loss nor teacher, no batch, nothing to train, or a number is out of range.
        NonFiniteGradientError: A gradient is NaN or infinite; a smaller ``lr`` may help.

    Example:
        >>> from dynarank.compress import compress_
        >>> _ = torch.manual_seed(0)
        >>> model = nn.Sequential(nn.Linear(20, 20), nn.ReLU(), nn.Linear(20, 20), nn.ReLU(), nn.Linear(20, 5))
        >>> report = compress_(model, 0.6)
        >>> batches = [(torch.randn(16, 20), torch.randint(5, (16,)))]
        >>> outcome = recover_(model, batches, lambda y, batch: nn.functional.cross_entropy(y, batch[1]), steps=20)
        >>> outcome.last_loss < outcome.first_loss
        True

    Reference:
        Schotthöfer et al., "Low-rank lottery tickets", NeurIPS 2022, https://arxiv.org/abs/2205.13571, section 5.3
        (retraining a truncated network on the manifold); Hinton, Vinyals, Dean, https://arxiv.org/abs/1503.02531.
    """
    if loss is None and teacher is None:
        raise ValueError("recover_ needs a loss, a teacher or both, got neither.")
    if not isinstance(steps, int) or steps < 1:
        raise ValueError(f"steps must be a whole number, at least 1, got {steps}.")
    objective = _Objective(loss, teacher, distance or SoftTargets(), teacher_weight, forward)
    layers = factored_layers(model)
    before = {name: layer.rank for name, layer in layers.items()}
    began = time.monotonic()
    with training_only(model, only) if only is not None else nullcontext():
        trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
        if trained == 0:
            raise ValueError("recover_ has nothing to train: every parameter is frozen. See only and requires_grad.")
        options = {"lr": 1e-3} | dict(base_options or {})
        if only == CORE or not layers:
            build: Any = base
            optimizer = build([p for p in model.parameters() if p.requires_grad], **options)
        else:
            optimizer = LowRankOptimizer(
                model,
                lr=lr,
                integrator=integrator,
                rank_policy=rank_policy,
                schedule=schedule or Periodic(every=max(1, steps // 20), freeze=max(1, steps // 2)),
                base=base,
                base_options=options,
            )
        with _in_their_modes(model, teacher):
            losses = _train(model, optimizer, repeated(batches), objective, steps=steps, tell=tell)
    tenth = max(1, steps // 10)
    return Recovery(
        steps,
        time.monotonic() - began,
        sum(losses[:tenth]) / tenth,
        sum(losses[-tenth:]) / tenth,
        before,
        {name: layer.rank for name, layer in layers.items()},
        trained,
    )


@contextmanager
def _in_their_modes(model: nn.Module, teacher: nn.Module | None) -> Iterator[None]:
    """Put the teacher into evaluation mode and the model into training mode for a while; every flag is kept."""
    modes = {module: module.training for one in (model, teacher) if one is not None for module in one.modules()}
    try:
        if teacher is not None:
            teacher.eval()
        model.train()
        yield
    finally:
        for module, mode in modes.items():
            module.training = mode


@dataclass(frozen=True)
class _Objective:
    loss: Callable[[Any, Any], Tensor] | None
    teacher: nn.Module | None
    distance: Distance
    weight: float
    forward: Forward

    def __call__(self, model: nn.Module, batch: Any) -> Tensor:
        outputs = self.forward(model, batch)
        terms = [self.loss(outputs, batch)] if self.loss is not None else []
        if self.teacher is not None:
            with torch.no_grad():
                wanted = self.forward(self.teacher, batch)
            terms.append(self.weight * self.distance(outputs, wanted))
        return sum(terms[1:], terms[0])


def _train(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    batches: Iterator[Any],
    objective: _Objective,
    *,
    steps: int,
    tell: Callable[[int, int, float], None] | None,
) -> list[float]:
    scheduler = LambdaLR(optimizer, lambda step: rise_and_fall(step, steps))
    losses: list[float] = []
    for step in range(1, steps + 1):
        losses.append(take_step(optimizer, partial(_gradients, model, optimizer, objective, next(batches), step)))
        scheduler.step()
        if tell is not None and step % 50 == 0:
            tell(step, steps, sum(losses[-50:]) / 50)
    optimizer.zero_grad()  # no gradient is left behind to be added to
    return losses


def _gradients(
    model: nn.Module, optimizer: torch.optim.Optimizer, objective: _Objective, batch: Any, step: int
) -> float:
    optimizer.zero_grad()
    loss = objective(model, batch)
    loss.backward()
    if not isinstance(optimizer, LowRankOptimizer):  # which looks itself
        _check_gradients(model, step)
    return float(loss.detach())


def _check_gradients(model: nn.Module, step: int) -> None:
    for name, p in model.named_parameters():
        if p.grad is not None and not bool(p.grad.isfinite().all()):
            raise NonFiniteGradientError(
                f"{name}: gradient is not finite at step {step}. The model is left as after step {step - 1}. "
                "Look at the data and the learning rate."
            )


def rise_and_fall(step: int, steps: int) -> float:
    """Return the learning rate after ``step`` of ``steps`` as a part of the largest: a short rise, then a cosine.

    Example:
        >>> [round(rise_and_fall(step, 100), 2) for step in (0, 4, 5, 52, 100)]
        [0.2, 1.0, 1.0, 0.51, 0.0]
    """
    rise = max(1, steps // 20)
    if step < rise:
        return (step + 1) / rise
    return 0.5 * (1 + math.cos(math.pi * (step - rise) / max(1, steps - rise)))


def repeated(batches: Iterable[Any]) -> Iterator[Any]:
    """Yield the batches again and again.

    Raises:
        ValueError: There is none.
    """
    empty = True
    while True:
        for batch in batches:
            empty = False
            yield batch
        if empty:
            raise ValueError("recover_: batches holds no batch, or is an iterator that has come to its end.")
        empty = True


@contextmanager
def training_only(model: nn.Module, only: Selector) -> Iterator[nn.Module]:
    """Let only part of a model train for a while, for recovery with little memory.

    ``"core"`` puts every low-rank layer into its core form, ``W = U S V^T`` with frozen bases, so that gradients and
    optimizer state are those of the small ``S``; biases and normalisation train as well, and convolutions in Tucker
    form stay as they are but for theirs. Anything else names layers, as in ``target_modules``. Afterwards the form of
    the layers and what requires gradients are as before.

    Args:
        model: The model, changed in place.
        only: ``"core"``, or names of layers.

    Raises:
        ValueError: A name matches nothing, or there is no low-rank layer for ``"core"``.

    Example:
        >>> from dynarank.layers.linear import LowRankLinear
        >>> model = nn.Sequential(LowRankLinear(100, 50, rank=3))
        >>> with training_only(model, "core"):
        ...     sorted(name for name, p in model.named_parameters() if p.requires_grad)
        ['0.S', '0.bias']
    """
    layers = low_rank_layers(model)
    if only == CORE and not layers:
        raise ValueError("only='core' needs low-rank layers, and the model has none. Call compress_ first.")
    chosen = (
        None
        if only == CORE
        else {one.site.module for one in choose_sites(model, target_modules=only) if one.reason in ("", TUCKER)}
    )
    flags = {name: p.requires_grad for name, p in model.named_parameters()}
    forms: dict[str, Any] = {name: layer.form for name, layer in layers.items()}
    try:
        for layer in layers.values() if only == CORE else ():
            layer.set_factors(layer.factors(), form="core")
        _freeze(model, chosen)
        yield model
    finally:
        try:
            for name, layer in layers.items():
                if layer.form != forms[name]:
                    layer.set_factors(layer.factors(), form=forms[name])
        finally:
            for name, p in model.named_parameters():
                p.requires_grad_(flags.get(name, True))


def _freeze(model: nn.Module, chosen: set[Any] | None) -> None:
    """Freeze everything but the chosen layers; without a choice everything but cores and vectors."""
    for module in model.modules():
        for name, p in module._parameters.items():
            if p is not None:
                trains = (name == "S" or p.dim() == 1) if chosen is None else module in chosen
                p.requires_grad_(p.requires_grad and trains)
