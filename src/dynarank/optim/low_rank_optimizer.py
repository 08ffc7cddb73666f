"""The optimizer that moves low-rank layers along the manifold and everything else with a base optimizer."""

import logging
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from dynarank import factors
from dynarank._discovery import resolve
from dynarank.errors import NonFiniteGradientError
from dynarank.events import RankEvent
from dynarank.factors import FactorPair
from dynarank.integrators.base import AbstractIntegrator
from dynarank.layers.base import AbstractLowRankLayer, low_rank_layers
from dynarank.optim import _transaction
from dynarank.ranks.base import AbstractRankPolicy, Decision, PlanContext
from dynarank.ranks.fixed import Fixed
from dynarank.schedules.base import AbstractSchedule
from dynarank.schedules.periodic import Periodic

logger = logging.getLogger("dynarank")


class LowRankOptimizer(torch.optim.Optimizer):
    """Drives low-rank layers with an integrator and all other parameters with a base optimizer.

    One group (the first) holds the factors; the others are the base optimizer's own. Learning-rate schedulers,
    clipping, ``GradScaler``, accumulation and ``state_dict`` see one ordinary optimizer with all parameters.

    Args:
        model: A model with low-rank layers, after ``factorize_``.
        lr: Step size for the factors, in the integrator's convention.
        momentum: Weight of the past in the averaged gradient of the factors.
        weight_decay: Decoupled decay of the low-rank weights: ``W <- (1 - lr * weight_decay) W``.
        integrator: Name or instance of an integrator.
        rank_policy: Name or instance of a rank policy; plans the ranks at each event.
        schedule: When rank events happen and ranks freeze; by default every 25 steps, never freezing.
        base: Class of the optimizer for everything that is not a factor.
        base_options: Its options, such as ``{"lr": 1e-3}``.
        nonfinite: What to do when a gradient is NaN or infinite: ``"raise"`` or ``"skip"`` the whole step.

    Raises:
        ValueError: The model has no low-rank layer, or a name is unknown.

    Example:
        >>> from dynarank.layers.linear import LowRankLinear
        >>> model = nn.Sequential(LowRankLinear(8, 6, rank=2), nn.ReLU(), nn.Linear(6, 3))
        >>> optimizer = LowRankOptimizer(model, lr=0.02)
        >>> model(torch.ones(4, 8)).square().mean().backward()
        >>> optimizer.step()
        >>> len(optimizer.param_groups)
        2
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        lr: float = 0.02,
        momentum: float = 0.9,
        weight_decay: float = 0.0,
        integrator: str | AbstractIntegrator = "tangent_muon",
        rank_policy: str | AbstractRankPolicy | None = None,
        schedule: AbstractSchedule | None = None,
        base: type[torch.optim.Optimizer] = torch.optim.AdamW,
        base_options: Mapping[str, Any] | None = None,
        nonfinite: str = "raise",
    ) -> None:
        self.layers = low_rank_layers(model)
        if not self.layers:
            raise ValueError("LowRankOptimizer found no low-rank layer in the model. Call factorize_(model) first.")
        if nonfinite not in ("raise", "skip"):
            raise ValueError(f"nonfinite must be 'raise' or 'skip', got {nonfinite!r}.")
        self.integrator: AbstractIntegrator = resolve(
            "integrator", "dynarank.integrators", AbstractIntegrator, integrator
        )  # type: ignore[assignment]
        self.rank_policy: AbstractRankPolicy = resolve(
            "rank policy", "dynarank.ranks", AbstractRankPolicy, rank_policy or Fixed()
        )  # type: ignore[assignment]
        self.schedule = schedule or Periodic()
        self.nonfinite = nonfinite
        self.steps = 0
        self.frozen = False
        self._model = model
        self._written: dict[str, tuple[int, ...]] = {}
        self._callbacks: list[Callable[[list[RankEvent]], None]] = []
        factor_ids = {id(p) for layer in self.layers.values() for p in _factors_of(layer)}
        rest = [p for p in model.parameters() if id(p) not in factor_ids]
        self.base = base(rest, **(base_options or {})) if rest else None
        group = {"params": [p for layer in self.layers.values() for p in _factors_of(layer)]}
        groups = [group, *(self.base.param_groups if self.base else [])]
        super().__init__(groups, {"lr": lr, "momentum": momentum, "weight_decay": weight_decay})
        self._share_with_base()

    def _share_with_base(self) -> None:
        """Let the base optimizer work on the very same groups and state, so that one state dict holds all."""
        if self.base is not None:
            self.base.param_groups = self.param_groups[1:]
            self.base.state = self.state

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:  # type: ignore[override]
        """Take one step with the gradients at hand; then, if the schedule says so, change ranks."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        if not self._gradients_are_finite():
            return loss
        moves = [(layer, name, *self._move(name, layer)) for name, layer in self.layers.items() if _has_gradient(layer)]
        for layer, name, point, state in moves:
            self._write(name, layer, point, state)
        if self.base is not None:
            self.base.step()
        self.steps += 1
        moment = "none" if self.frozen else self.schedule.moment(self.steps)
        if moment != "none":
            self._change_ranks(last=moment == "last")
        return loss

    def _move(self, name: str, layer: AbstractLowRankLayer) -> tuple[Any, dict[str, Tensor]]:
        """Return where the layer goes; nothing is written yet."""
        group = self.param_groups[0]
        point, gradient = layer.point(), layer.point_gradient()
        trusted = self._trusts(name, layer)
        state = self.state_of(layer) if trusted else None
        if not state:
            state = self.integrator.init(point)
        if group["weight_decay"]:
            point = factors.scaled(point, 1 - group["lr"] * group["weight_decay"])
        return self.integrator.advance(
            point, gradient, state, lr=group["lr"], momentum=group["momentum"], trusted=trusted
        )

    def state_of(self, layer: AbstractLowRankLayer) -> dict[str, Tensor]:
        """Return the integrator's state of a layer; it is kept under the layer's first factor."""
        return self.state[_factors_of(layer)[0]]

    def _trusts(self, name: str, layer: AbstractLowRankLayer) -> bool:
        return self._written.get(name) == _versions(layer)

    def _write(self, name: str, layer: AbstractLowRankLayer, point: Any, state: dict[str, Tensor]) -> None:
        layer.set_factors(point, resize=False)
        self.state[_factors_of(layer)[0]] = state
        self._written[name] = _versions(layer)

    # --- rank events ---------------------------------------------------------------------------------------------

    def _change_ranks(self, *, last: bool) -> list[RankEvent]:
        events = _transaction.change_ranks(self, last=last)
        self.frozen = self.frozen or last
        for callback in self._callbacks:
            callback(events)
        return events

    def plan_ranks(self) -> dict[str, Decision]:
        """Return what the rank policy would decide now, changing nothing: a dry run of the next event."""
        return _transaction.plan(self)

    def freeze_ranks(self) -> list[RankEvent]:
        """Hold one last rank event without new candidates; ranks stay from then on."""
        return self._change_ranks(last=True)

    def plan_context(self) -> PlanContext:
        """Return what rank policies know about the run: the step and the size of everything."""
        matrices = sum(m * n for m, n in (layer.matrix_shape for layer in self.layers.values()))
        tensors = [*self._model.parameters(), *self._model.buffers()]
        factor_ids = {id(p) for layer in self.layers.values() for p in (layer.A, layer.B, layer.S, layer.U, layer.V)}
        other = sum(t.numel() for t in tensors if id(t) not in factor_ids)
        return PlanContext(self.steps, matrices + other, other)

    def on_rank_event(self, callback: Callable[[list[RankEvent]], None]) -> None:
        """Call ``callback(events)`` after every rank event, with one event per layer."""
        self._callbacks.append(callback)

    # --- gradients -----------------------------------------------------------------------------------------------

    def _gradients_are_finite(self) -> bool:
        gradients = [p.grad for group in self.param_groups for p in group["params"] if p.grad is not None]
        if not gradients or bool(torch.isfinite(torch.nn.utils.get_total_norm(gradients))):
            return True
        guilty = [name for name, p in self._model.named_parameters() if p.grad is not None and not _finite(p.grad)]
        if not guilty:
            return True  # the norm overflowed, the gradients did not
        if self.nonfinite == "skip":
            logger.warning("%s: gradient is not finite at step %d; the step was skipped.", guilty[0], self.steps + 1)
            return False
        raise NonFiniteGradientError(
            f"{guilty[0]}: gradient is not finite at step {self.steps + 1}. Everything was left as after step "
            f"{self.steps}. Look at the data and the learning rate, or pass nonfinite='skip'."
        )


def _factors_of(layer: AbstractLowRankLayer) -> list[nn.Parameter]:
    return [p for p in (layer.A, layer.B, layer.S) if p is not None]


def _has_gradient(layer: AbstractLowRankLayer) -> bool:
    return any(p.grad is not None for p in _factors_of(layer))


def _versions(layer: AbstractLowRankLayer) -> tuple[int, ...]:
    """What changes whenever anybody writes to the factors."""
    return tuple(v for p in _factors_of(layer) for v in (id(p), p._version))


def _finite(tensor: Tensor) -> bool:
    return bool(torch.isfinite(tensor).all())
