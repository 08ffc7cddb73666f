"""The optimizer that moves low-rank layers along the manifold and everything else with a base optimizer."""

import logging
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from dynarank import factors
from dynarank.distributed import Replicas
from dynarank.events import RankEvent
from dynarank.factors import FactorPair
from dynarank.integrators.base import AbstractIntegrator, Point, Stages, State
from dynarank.layers._factored import AbstractFactoredLayer, factored_layers, ranks_held
from dynarank.optim import _transaction
from dynarank.optim._base import drop_foreign_options, follow_momentum
from dynarank.optim._gradients import accepts, find_nonfinite, takes_part
from dynarank.optim._layer_state import pack, stored, unpack_point, unpack_state
from dynarank.optim._options import check_base, check_forms, check_nonfinite, check_numbers, choose_methods
from dynarank.optim._ownership import check_ownership, split_group
from dynarank.optim._seals import Seals
from dynarank.optim._several import check_closure, follow, gradients_at, nonfinite_layer
from dynarank.optim._state_dict import check_saved, restore_as_saved
from dynarank.ranks.base import AbstractRankPolicy, Decision
from dynarank.schedules.base import AbstractSchedule

logger = logging.getLogger("dynarank")

Put = Callable[[Point], Point]


class LowRankOptimizer(torch.optim.Optimizer):
    """Drives low-rank layers with an integrator and all other parameters with a base optimizer.

    One group (the first) holds the factors; the others are the base optimizer's own. Learning-rate schedulers,
    clipping, ``GradScaler``, accumulation and ``state_dict`` see one ordinary optimizer with all parameters. A layer
    that is frozen, or took no part in the backward pass, is left alone.

    Args:
        model: A model with low-rank layers, after ``factorize_``. In a data-parallel run, its
            ``DistributedDataParallel`` wrapper, which then follows the ranks.
        lr: Step size for the factors, in the integrator's convention.
        momentum: Weight of the past in the averaged gradient of the factors.
        weight_decay: Decoupled decay of the low-rank weights: every step ends with ``W <- (1 - lr * weight_decay) W``.
        integrator: Name or instance of an integrator.
        rank_policy: Name or instance of a rank policy; plans the ranks at each event. By default `NoiseEdge`.
        schedule: When rank events happen and ranks freeze; by default every 25 steps, never freezing.
        base: Class of the optimizer for everything that is not a factor.
        base_options: Its options, such as ``{"lr": 1e-3}``.
        nonfinite: What to do when a gradient is NaN or infinite: ``"raise"`` or ``"skip"`` the whole step.
        dense_start: Whether the model may have no low-rank layer yet: they join by ``add_param_group``.

    Raises:
        ValueError: The model has no low-rank layer, a name is unknown, or the base optimizer needs a closure.
        TypeError: ``base`` is not the class of an optimizer.

    Example:
        >>> from dynarank.layers.linear import LowRankLinear
        >>> model = nn.Sequential(LowRankLinear(8, 6, rank=2), nn.ReLU(), nn.Linear(6, 3))
        >>> optimizer = LowRankOptimizer(model, lr=0.02)
        >>> model(torch.ones(4, 8)).square().mean().backward()
        >>> optimizer.step()
        >>> len(optimizer.param_groups)
        2
    """

    _ready = False  # while torch's constructor adds the groups

    def __init__(
        self,
        model: nn.Module,
        *,
        lr: float = 0.025,
        momentum: float = 0.9,
        weight_decay: float = 0.0,
        integrator: str | AbstractIntegrator = "gauge_fixed_muon",
        rank_policy: str | AbstractRankPolicy | None = None,
        schedule: str | AbstractSchedule | None = None,
        base: type[torch.optim.Optimizer] = torch.optim.AdamW,
        base_options: Mapping[str, Any] | None = None,
        nonfinite: str = "raise",
        dense_start: bool = False,
    ) -> None:
        check_numbers(lr=lr, momentum=momentum, weight_decay=weight_decay)
        self.replicas = Replicas(model)
        self.model = model = self.replicas.module
        self.layers = factored_layers(model)
        if not self.layers and not dense_start:
            raise ValueError("LowRankOptimizer found no low-rank layer in the model. Call factorize_(model) first.")
        self.integrator, self.rank_policy, self.schedule = choose_methods(integrator, rank_policy, schedule)
        check_forms(self.integrator, self.layers)
        self.nonfinite = check_nonfinite(nonfinite)
        self.steps = 0
        self.frozen = False
        self.seals = Seals(whole=self.integrator.keeps_gauge)
        self._callbacks: list[Callable[[list[RankEvent]], None]] = []
        self.kept_ranks = ranks_held(self.layers)  # candidates not counted
        self._postponed = 0
        self._changes_noted = False
        self._ownership_checked, self._loose = False, []
        self._make_base = partial(check_base(base), **(base_options or {}))
        self.base = self._build_base()
        groups = [{"params": self._factors()}, *(self.base.param_groups if self.base else [])]
        super().__init__(groups, {"lr": lr, "momentum": momentum, "weight_decay": weight_decay})
        if self.base is not None:
            drop_foreign_options(self.param_groups[1:], self.base, self.defaults)
        self._share_with_base()
        self._ready = True
        self.replicas.watch(self)

    def _build_base(self) -> torch.optim.Optimizer | None:
        """Return the base optimizer over everything that is not a factor, or None if nothing is left."""
        factor_ids = {id(p) for p in self._factors()}
        rest = [p for p in self.model.parameters() if id(p) not in factor_ids]
        return self._make_base(rest) if rest else None

    # --- the step ------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:  # type: ignore[override]
        """Take one step with the gradients at hand; then, if the schedule says so, change ranks.

        Args:
            closure: Clears the gradients, computes the loss, calls backward, returns the loss. An integrator that
                takes several gradients needs it and runs it as often, and no gradient is left afterwards; for all
                others it is optional.

        Raises:
            NonFiniteGradientError: A gradient holds NaN or infinity, and ``nonfinite`` is ``"raise"``.
            RuntimeError: The model has low-rank layers that the optimizer does not drive, only one factor of a
                layer is frozen, or an integrator cannot get the gradients that it needs.
        """
        if several := self.integrator.gradients > 1:
            self._refresh_factors()
            check_closure(self.integrator, closure, self.param_groups, processes=self.replicas.processes)
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        if self._step(closure):
            self.steps += 1
            self._hold_event_if_due()
        if several:
            self.zero_grad()
        return loss

    def _step(self, closure: Callable[[], Any] | None) -> bool:
        """Move every parameter along the gradients at hand; return whether the step was taken, not skipped."""
        self._refresh_factors()
        self._check_ownership()
        if not accepts(find_nonfinite(self.model, self.param_groups), self.steps, nonfinite=self.nonfinite):
            return False
        decay = factors.check_decay(self.param_groups[0]["lr"] * self.param_groups[0]["weight_decay"])
        # Checked first; then all layers are computed before any is written, but by integrators that work in place.
        active = {name: layer for name, layer in self.layers.items() if takes_part(name, layer)}
        held = self.seals.holding(active)
        self._note_changes([name for name in active if name not in held])
        ways = {n: self._move(n, layer, decay, sealed=n in held) for n, layer in active.items()}
        if self.integrator.in_place:  # what others may refuse, they refuse before a factor has moved
            self._step_base()
        ends = follow(ways, partial(self._gradients_at, closure))
        if ends is None:
            return False
        moves = [(name, layer, *ends[name]) for name, layer in active.items()]
        with self.replicas.replacing({name: (layer, point) for name, layer, point, _ in moves}):
            if not self.integrator.in_place:
                self._step_base()
            for name, layer, point, state in moves:
                self.write(name, layer, point, state)
        return True

    def _step_base(self) -> None:
        if self.base is not None:
            follow_momentum(self.base)
            self.base.step()

    def _gradients_at(self, closure: Any, points: Mapping[str, Point]) -> Mapping[str, FactorPair | Tensor] | None:
        """Return the gradients of the layers at other points, or None if one is not finite and the step is skipped."""
        self.zero_grad()
        gradients = gradients_at(points, self.layers, closure)
        guilty = nonfinite_layer(gradients) or find_nonfinite(self.model, self.param_groups)
        return gradients if accepts(guilty, self.steps, nonfinite=self.nonfinite) else None

    def _move(self, name: str, layer: AbstractFactoredLayer, decay: float, *, sealed: bool) -> Stages:
        """Return where the layer goes and the state there, by the stages of the integrator; most write nothing yet."""
        group = self.param_groups[0]
        point, state = self._look(layer, sealed=sealed)
        trusted = state is not None
        state = state if trusted else self.integrator.init(point)
        if not trusted and self.integrator.keeps_gauge and isinstance(point, FactorPair) and factors.is_singular(point):
            logger.warning(
                "%s: a factor had lost a direction; it gets fresh ones and sits out step %d.", name, self.steps + 1
            )
            return factors.to_pair(factors.read_pair(point)), state
        gradient = layer.point_gradient()
        assert gradient is not None
        point, state = yield from self.integrator.stages_(
            point, gradient, state, lr=group["lr"], momentum=group["momentum"], trusted=trusted
        )
        return (factors.scaled(point, 1 - decay) if decay else point), state

    def _note_changes(self, broken: list[str]) -> None:
        """Say once that somebody else writes to factors: a loop that does it in every step never has any momentum."""
        changed = [name for name in broken if stored(self.layers[name])[0] in self.state]
        if changed and not self._changes_noted:
            self._changes_noted = True
            logger.warning(
                "%s: the factors are not as step %d left them. They are read as they are, and their momentum starts "
                "afresh; so it will be whenever others write to factors, without further notice.",
                ", ".join(changed),
                self.steps,
            )

    # --- layers --------------------------------------------------------------------------------------------------

    def look(self, name: str, layer: AbstractFactoredLayer) -> tuple[Point, State | None]:
        """Return where a layer is and the integrator's state there, None where it is not what was written last.

        Layers in half precision are where their float32 masters are.
        """
        return self._look(layer, sealed=self.seals.hold(name, layer))

    def _look(self, layer: AbstractFactoredLayer, *, sealed: bool) -> tuple[Point, State | None]:
        kept = self.state.get(stored(layer)[0])
        if kept is None or not sealed:
            return layer.point(), None
        return unpack_point(kept) or layer.point(), unpack_state(kept)

    def write(
        self, name: str, layer: AbstractFactoredLayer, point: Point, state: State, put: Put | None = None
    ) -> None:
        """Set a layer's factors, by ``move_to`` unless told otherwise, and the state that belongs to them."""
        before, stands = stored(layer)[0], (put or layer.move_to)(point)
        if stands is not point:  # the layer could not hold it exactly
            point, state = stands, self.integrator.transport(state, point, stands)
        parameter = stored(layer)[0]
        if parameter is not before:
            self._refresh_factors()
        self.state[parameter] = pack(point, state, dtype=parameter.dtype)
        self.seals.set(name, layer)

    def _factors(self) -> list[nn.Parameter]:
        return [p for layer in self.layers.values() for p in stored(layer)]

    def _refresh_factors(self) -> None:
        """Let the first group hold the factors as they are: a layer that changed its form has new parameters."""
        now, before = self._factors(), self.param_groups[0]["params"]
        if len(now) == len(before) and all(a is b for a, b in zip(now, before, strict=True)):
            return
        kept = {id(p) for p in now}
        for parameter in before:
            if id(parameter) not in kept:
                self.state.pop(parameter, None)
        self.param_groups[0]["params"] = now

    def _check_ownership(self, *, again: bool = False) -> None:
        if again or not self._ownership_checked:
            self._loose = check_ownership(self.model, self.layers, self.param_groups, known=self._loose)
            self._ownership_checked = True

    # --- rank events ---------------------------------------------------------------------------------------------

    def plan_ranks(self) -> dict[str, Decision]:
        """Return what the rank policy would decide now, changing nothing: a dry run of the next event."""
        with torch.no_grad():
            return _transaction.decisions_of(self, _transaction.plan(self))

    @torch.no_grad()
    def change_ranks(self) -> list[RankEvent]:
        """Hold a rank event now, whatever the schedule says: after a switch from dense, say. Frozen ranks stay."""
        return [] if self.frozen else self._hold_event(last=False)

    @torch.no_grad()
    def freeze_ranks(self) -> list[RankEvent]:
        """Hold the last rank event, without new candidates: from then on ranks stay, and every layer is in pair form.

        An integrator that works in cycles goes on with them. Call this again at the end of training: it only brings
        layers inside a cycle back to the pair form, at their own rank.
        """
        events = [] if self.frozen else self._hold_event(last=True)
        closed = self._settle([name for name, layer in self.layers.items() if not layer.fits(layer.rank)])
        self._announce(closed)
        return events + closed

    def on_rank_event(self, callback: Callable[[list[RankEvent]], None]) -> None:
        """Call ``callback(events)`` after every rank event, with one event per layer."""
        self._callbacks.append(callback)

    def _hold_event_if_due(self) -> None:
        moment = "none" if self.frozen else self.schedule.moment(self.steps)
        if moment != "none":
            self._hold_event(last=moment == "last")
        elif self.integrator.gradients > 1:
            self._settle([name for name, layer in self.layers.items() if layer.form == "core"])
        elif self.frozen and self._postponed:
            self._settle([n for n, layer in self.layers.items() if layer.form == "pair" and not layer.fits(layer.rank)])

    def _hold_event(self, *, last: bool) -> list[RankEvent]:
        self._check_ownership(again=True)
        self.replicas.compare(self)
        plan = _transaction.agree(self, _transaction.plan(self))
        events = self._carry_out(plan, grow=not last)
        self.frozen = self.frozen or last
        self._announce(events)
        return events

    def _settle(self, names: list[str]) -> list[RankEvent]:
        """Give layers the form and the capacity of their own rank; return what changed a rank, if anything did."""
        events = self._carry_out(_transaction.keep(self, names), grow=False)
        return [event for event in events if event.new_rank != event.old_rank]

    def _carry_out(self, plan: _transaction.Plan, *, grow: bool) -> list[RankEvent]:
        events, refusal = _transaction.change_ranks(self, plan, grow=grow)
        self.kept_ranks |= {event.layer: event.new_rank for event in events}
        self._postponed = self._postponed + 1 if refusal else 0
        if self._postponed == _transaction.PATIENCE:
            logger.warning(_transaction.POSTPONED, self._postponed, refusal)
        return events

    def _announce(self, events: list[RankEvent]) -> None:
        for callback in self._callbacks if events else ():
            callback(events)

    # --- groups and state dict ------------------------------------------------------------------------------------

    def _share_with_base(self) -> None:
        """Let the base optimizer work on the very same groups and state, so that one state dict holds all."""
        if self.base is not None:
            self.base.param_groups = self.param_groups[1:]
            self.base.state = self.state

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add parameters: factors of low-rank layers join the first group, all others become a group of the base.

        Raises:
            ValueError: A parameter is in the optimizer already, a layer is given in part, or options are given for
                factors alone.
        """
        if not self._ready:
            super().add_param_group(param_group)
            return
        found, rest = split_group(self.model, self.layers, param_group)
        if rest["params"]:
            self._add_to_base(rest)
        self.layers |= found
        self.kept_ranks |= ranks_held(found)
        self._refresh_factors()
        self._ownership_checked = False

    def _add_to_base(self, group: dict[str, Any]) -> None:
        if self.base is None:
            self.base = self._make_base([group])
        else:
            self.base.add_param_group(group)
        group = self.base.param_groups[-1]
        super().add_param_group(group)
        drop_foreign_options([group], self.base, self.defaults)
        self._share_with_base()

    def state_dict(self) -> dict[str, Any]:
        """Return everything needed to go on exactly: tensors, numbers and names only."""
        self._refresh_factors()
        own = {
            "steps": self.steps,
            "frozen": self.frozen,
            "postponed": self._postponed,
            "kept_ranks": dict(self.kept_ranks),
            "integrator": type(self.integrator).__name__,
            "layers": list(self.layers),
            "fingerprints": self.seals.fingerprints(self.layers),
        }
        return {**super().state_dict(), "low_rank": own}

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:  # type: ignore[override]
        """Take over a saved state. Load the model first: the state has the shape of its ranks.

        Raises:
            ValueError: The state is not of a ``LowRankOptimizer`` with the same integrator, or belongs to other ranks
                or parameters. Nothing was changed.
        """
        self._refresh_factors()
        check_saved(self, state_dict)
        saved = {key: value for key, value in state_dict.items() if key != "low_rank"}
        super().load_state_dict(saved)
        restore_as_saved(self, saved)
        self._share_with_base()
        own = state_dict["low_rank"]
        self.kept_ranks = dict(own.get("kept_ranks", {}))
        self.steps, self.frozen, self._postponed = own["steps"], own["frozen"], own["postponed"]
        self.seals.expect(self.layers, own["fingerprints"])

    def __getstate__(self) -> dict[str, Any]:
        """Return all attributes, for copies and pickles; torch's own would leave out all but groups and state."""
        seals = Seals(whole=self.integrator.keeps_gauge)
        seals.expect(self.layers, self.seals.fingerprints(self.layers))
        kept = {k: v for k, v in self.__dict__.items() if k != "step" and not k.startswith("_optimizer_")}
        return {**kept, "seals": seals}
