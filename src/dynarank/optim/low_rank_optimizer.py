"""The optimizer that moves low-rank layers along the manifold and everything else with a base optimizer."""

import logging
from collections.abc import Callable, Mapping
from functools import partial
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
        self._unverified: dict[str, int] = {}
        self._callbacks: list[Callable[[list[RankEvent]], None]] = []
        self._postponed = 0
        self._make_base = partial(base, **(base_options or {}))
        factor_ids = {id(p) for p in self._factors()}
        rest = [p for p in model.parameters() if id(p) not in factor_ids]
        self.base = self._make_base(rest) if rest else None
        self._ready = False
        groups = [{"params": self._factors()}, *(self.base.param_groups if self.base else [])]
        super().__init__(groups, {"lr": lr, "momentum": momentum, "weight_decay": weight_decay})
        self._ready = True
        self._share_with_base()

    def _factors(self) -> list[nn.Parameter]:
        return [p for layer in self.layers.values() for p in stored(layer)]

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
        moves = [
            (layer, name, *self._move(name, layer))
            for name, layer in self.layers.items()
            if any(p.grad is not None for p in stored(layer))
        ]
        for layer, name, point, state in moves:
            self.write(name, layer, point, state, resize=False)
        if self.base is not None:
            self.base.step()
        self.steps += 1
        moment = "none" if self.frozen else self.schedule.moment(self.steps)
        if moment != "none":
            self._change_ranks(last=moment == "last")
        return loss

    def _move(self, name: str, layer: AbstractLowRankLayer) -> tuple[Any, dict[str, Tensor]]:
        """Return where the layer goes and the state there; nothing is written yet."""
        group = self.param_groups[0]
        point, gradient = self.point_of(name, layer), layer.point_gradient()
        trusted = self.trusts(name, layer)
        state = self.state_of(layer) if trusted else self.integrator.init(point)
        if not trusted and isinstance(point, FactorPair) and factors.is_singular(point):
            logger.warning(
                "%s: a factor had lost a direction; it gets fresh ones and sits out step %d.", name, self.steps
            )
            return factors.to_pair(factors.read_pair(point)), state
        if group["weight_decay"]:
            point = factors.scaled(point, 1 - group["lr"] * group["weight_decay"])
        return self.integrator.advance(
            point, gradient, state, lr=group["lr"], momentum=group["momentum"], trusted=trusted
        )

    def point_of(self, name: str, layer: AbstractLowRankLayer) -> Any:
        """Return the layer's factors, from their float32 masters where the layer stores them in half precision."""
        masters = self.state.get(stored(layer)[0], {})
        if "master_A" in masters and self.trusts(name, layer):
            return FactorPair(masters["master_A"], masters["master_B"])
        return layer.point()

    def state_of(self, layer: AbstractLowRankLayer) -> dict[str, Tensor]:
        """Return the integrator's state of a layer; it is kept under the layer's first parameter."""
        return {key: value for key, value in self.state[stored(layer)[0]].items() if not key.startswith("master_")}

    def trusts(self, name: str, layer: AbstractLowRankLayer) -> bool:
        """Whether the layer's factors are exactly what this optimizer wrote last, in this run or the one it resumes."""
        if name in self._unverified and self._unverified.pop(name) == fingerprint(layer):
            self._written[name] = versions(layer)
        return self._written.get(name) == versions(layer)

    def write(
        self, name: str, layer: AbstractLowRankLayer, point: Any, state: dict[str, Tensor] | None, *, resize: bool
    ) -> None:
        """Set a layer's factors and the integrator's state that belongs to them."""
        before = stored(layer)[0]
        layer.set_factors(point, resize=resize)
        after = stored(layer)[0]
        if after is not before:  # the form changed, and with it the parameters
            self.state.pop(before, None)
            self.param_groups[0]["params"] = self._factors()
        state = dict(self.integrator.init(point) if state is None else state)
        if isinstance(point, FactorPair) and after.dtype in (torch.bfloat16, torch.float16):
            state |= {"master_A": point.A, "master_B": point.B}
        self.state[after] = state
        self._written[name] = versions(layer)

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

    # --- groups and state dict ------------------------------------------------------------------------------------

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add parameters: factors of low-rank layers join the first group, all others become a group of the base."""
        if not getattr(self, "_ready", False):
            super().add_param_group(param_group)
            return
        params = param_group["params"]
        params = [params] if isinstance(params, Tensor) else list(params)
        wanted = {id(p) for p in params}
        found = {n: m for n, m in low_rank_layers(self._model).items() if wanted & {id(p) for p in stored(m)}}
        if known := sorted(self.layers.keys() & found.keys()):
            raise ValueError(f"add_param_group: the factors of {', '.join(known)} are in the optimizer already.")
        self.layers |= found
        self.param_groups[0]["params"] = self._factors()
        adopted = {id(p) for layer in found.values() for p in stored(layer)}
        rest = {**param_group, "params": [p for p in params if id(p) not in adopted]}
        if not rest["params"]:
            return
        if self.base is None:
            self.base = self._make_base([rest])
        else:
            self.base.add_param_group(rest)
        super().add_param_group(self.base.param_groups[-1])
        self._share_with_base()

    def state_dict(self) -> dict[str, Any]:
        """Return everything needed to go on exactly: tensors, numbers and names only."""
        written = {name: fingerprint(layer) for name, layer in self.layers.items() if self.trusts(name, layer)}
        return {
            **super().state_dict(),
            "low_rank": {"steps": self.steps, "frozen": self.frozen, "fingerprints": written},
        }

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:  # type: ignore[override]
        """Take over a saved state. Load the model first: the state has the shape of its ranks.

        Raises:
            ValueError: The state is not of a ``LowRankOptimizer``, or belongs to other ranks or parameters.
        """
        if "low_rank" not in state_dict:
            raise ValueError("load_state_dict needs the state of a LowRankOptimizer, got one without 'low_rank'.")
        self.param_groups[0]["params"] = self._factors()
        saved = {key: value for key, value in state_dict.items() if key != "low_rank"}
        self._check_shapes(saved)
        super().load_state_dict(saved)
        for index, layer in self._state_indices():
            if index in saved["state"]:  # as saved: torch casts state to the dtype of the parameter
                device = stored(layer)[0].device
                self.state[stored(layer)[0]] = {k: v.clone().to(device) for k, v in saved["state"][index].items()}
        self._share_with_base()
        own = state_dict["low_rank"]
        self.steps, self.frozen = own["steps"], own["frozen"]
        self._unverified, self._written = dict(own["fingerprints"]), {}

    def _state_indices(self) -> list[tuple[int, AbstractLowRankLayer]]:
        """Return where each layer's state stands in a state dict: torch numbers the parameters through the groups."""
        positions = {id(p): i for i, p in enumerate(self.param_groups[0]["params"])}
        return [(positions[id(stored(layer)[0])], layer) for layer in self.layers.values()]

    def _check_shapes(self, saved: Mapping[str, Any]) -> None:
        names = {id(layer): name for name, layer in self.layers.items()}
        for index, layer in self._state_indices():
            expected = shapes(self.integrator.init(layer.point()))
            found = shapes({k: v for k, v in saved["state"].get(index, {}).items() if not k.startswith("master_")})
            if found and expected and found != expected:
                raise ValueError(
                    f"{names[id(layer)]}: the saved state has shapes {found}, but rank {layer.rank} needs {expected}. "
                    "Load the model's checkpoint before the optimizer's, with the same integrator."
                )

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


def stored(layer: AbstractLowRankLayer) -> list[nn.Parameter]:
    """Return the parameters that hold the layer's factors; its state is kept under the first."""
    return [p for p in (layer.A, layer.B, layer.S) if p is not None]


def shapes(state: Mapping[str, Tensor]) -> dict[str, tuple[int, ...]]:
    """Return the shape of every tensor of a state."""
    return {key: tuple(value.shape) for key, value in state.items()}


def versions(layer: AbstractLowRankLayer) -> tuple[int, ...]:
    """Return what changes in memory whenever anybody writes to the factors."""
    return tuple(v for p in stored(layer) for v in (id(p), p._version))


def fingerprint(layer: AbstractLowRankLayer) -> int:
    """Return a number that tells whether factors are the same to the last bit, across runs."""
    check = 0
    for parameter in stored(layer):
        bits = parameter.detach().contiguous().view(torch.uint8)
        place = torch.arange(1, bits.numel() + 1, device=bits.device) % 65521
        check = (31 * check + int((bits.flatten() * place).sum())) % (1 << 61)
    return check


def _finite(tensor: Tensor) -> bool:
    return bool(torch.isfinite(tensor).all())
