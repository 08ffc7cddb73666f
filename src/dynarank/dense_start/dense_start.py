"""Networks that start with full rank: each layer goes low-rank when it is ready and a cut pays."""

import logging
from collections.abc import Callable, Iterable, Mapping
from math import ceil, floor
from typing import Any, Literal, final

import torch
from torch import nn
from torch.optim import Optimizer

from dynarank import factors, linalg
from dynarank.dense_start._candidates import StayDense, check_replaceable, find_candidates
from dynarank.dense_start._checks import check_options, check_switch, refuse_processes
from dynarank.dense_start._host import State, check_host, exchange, holder, join, note_frozen, transported
from dynarank.events import RankEvent
from dynarank.factorize import ConvForm, deployed_parameters
from dynarank.factorize.sites import put_in_place, refuse_wrapped
from dynarank.factors import LowRankFactors
from dynarank.layers.base import AbstractLowRankLayer
from dynarank.optim.low_rank_optimizer import LowRankOptimizer
from dynarank.ranks.base import AbstractRankPolicy, LayerSpectrum, PlanContext
from dynarank.switches.base import AbstractSwitch

Trained = Literal["core", "factors"]
StateAfter = Literal["fresh", "transported"]
PATIENCE = 5
logger = logging.getLogger("dynarank")
TINY = torch.finfo(torch.float64).tiny
ROUNDING = 1e-9  # of products such as 0.07 * 100, which is above 7


@final
class DenseStart:
    """Makes a network low-rank while any torch optimizer trains it: one line before the training loop.

    It acts within ``optimizer.step()``, after the update. Until its layer is ready a weight is dense and trained as
    ever. Then a rank policy looks at its spectrum, and as soon as the rank it keeps makes the layer smaller, the layer
    becomes low-rank: with ``trained="core"`` as ``W = U S V^T``, of which ``S`` takes the place of ``W`` in the
    optimizer and the bases stay, to be turned and cut by the SVD of ``S`` every ``every`` steps; with
    ``trained="factors"`` as two factors. If the optimizer is a `LowRankOptimizer`, it takes over the layer, so that
    bases move and ranks follow its own policy, up as well as down.

    Biases stay the same parameters, the global generator is not touched, only optimizer steps count.

    Args:
        model: A dense model; not wrapped for distributed training, and in one process.
        optimizer: What trains it: any torch optimizer of one gradient a step, or a `LowRankOptimizer` made with
            ``dense_start=True``.
        switch: When layers are ready.
        rank_policy: Which ranks they keep.
        every: Optimizer steps between refreshes, from the first switch on. None: a layer is looked at once, when it is
            ready; it is cut then, or stays dense for good.
        trained: What a torch optimizer trains of a low-rank layer.
        window: Part of the layers by which the window of refreshed layers grows at each refresh, the last layers of
            the model first. None: all layers at once.
        largest_cut: Largest part of its rank that a layer loses at a refresh, rounded up. None: no limit.
        keep_dense: Whether a layer stays dense until a cut makes it smaller. If not, it becomes low-rank as soon as it
            is ready, at full rank if need be, and is larger than dense until its rank falls.
        state: Whether the optimizer's state of a parameter with new bases starts ``"fresh"``, as that of any new
            parameter, or is ``"transported"`` to the new bases.
        steps: Optimizer steps of the whole run, if known, so that a switch that never comes is refused.
        target_modules: Layers that may go low-rank, as in `factorize_`.
        exclude_modules: Layers that stay dense, as in `factorize_`.
        include_head: Whether the classifier head may.
        conv_form: ``"matrix"`` or ``"spatial"``, as in `factorize_`.
        stay_dense: Asked once which candidates are to stay dense for good, and why.

    Attributes:
        left_dense: Why layers that have a low-rank twin stay dense for good, by name.

    Raises:
        ValueError: No layer could ever be smaller, the optimizer does not hold the weight of one, or an option is out
            of range.
        RuntimeError: The model is wrapped for distributed training, or trains in several processes.

    Reference:
        Coquelin, Flügel, Weiel, Kiefer, Debus, Streit, Götz, "Harnessing orthogonality to train low-rank neural
        networks", 2024, https://arxiv.org/abs/2401.08505, for ``trained="core"``. Wang, Agarwal, Papailiopoulos,
        "Pufferfish", MLSys 2021, https://arxiv.org/abs/2103.03936, for ``trained="factors"``.

    Example:
        >>> from dynarank.ranks.fraction import Fraction
        >>> from dynarank.switches.at_step import AtStep
        >>> model = nn.Sequential(nn.Linear(40, 30), nn.ReLU(), nn.Linear(30, 5))
        >>> optimizer = torch.optim.AdamW(model.parameters())
        >>> start = DenseStart(model, optimizer, switch=AtStep(2), rank_policy=Fraction(0.2))
        >>> for _ in range(3):
        ...     model(torch.ones(8, 40)).square().mean().backward()
        ...     optimizer.step()
        >>> start.low_rank["0"]
        LowRankLinear(in_features=40, out_features=30, bias=True, rank=6, form=core)
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: Optimizer,
        *,
        switch: AbstractSwitch,
        rank_policy: AbstractRankPolicy,
        every: int | None = None,
        trained: Trained = "core",
        window: float | None = None,
        largest_cut: float | None = None,
        keep_dense: bool = True,
        state: StateAfter = "fresh",
        steps: int | None = None,
        target_modules: Any = None,
        exclude_modules: Any = None,
        include_head: bool = False,
        conv_form: ConvForm = "matrix",
        stay_dense: StayDense | None = None,
    ) -> None:
        check_options(every=every, trained=trained, window=window, largest_cut=largest_cut, state=state)
        check_host(optimizer)
        refuse_processes()
        refuse_wrapped(model, "a dense start")
        check_switch(switch, steps)
        if state == "transported" and (trained != "core" or isinstance(optimizer, LowRankOptimizer)):
            raise ValueError(
                "state='transported' goes with trained='core' and a torch optimizer: two factors have none to inherit."
            )
        self.model, self.optimizer = model, optimizer
        self.switch, self.rank_policy, self.every = switch, rank_policy, every
        self.trained, self.state_after = trained, state
        self.window, self.largest_cut, self.keep_dense = window, largest_cut, keep_dense
        choice = {"target_modules": target_modules, "exclude_modules": exclude_modules, "include_head": include_head}
        self.candidates, self.left_dense = find_candidates(model, choice | {"conv_form": conv_form}, stay_dense)
        self.dense_parameters = deployed_parameters(model)
        self.steps = 0
        self.ready: frozenset[str] = frozenset()
        self.held: dict[str, int] = {}  # ranks after the last refresh; of a layer that is dense still, a virtual one
        self._low_rank: list[str] = []  # in the order in which they became so
        self._memory = switch.init()
        self._first: int | None = None  # the step at which a layer was ready
        self._reached = 0  # layers in the window
        self._idle = 0  # refreshes of all layers that made none low-rank
        self._frozen_noted = False
        self._callbacks: list[Callable[[list[RankEvent]], None]] = []
        self._check_held(self.candidates)
        self._handle = optimizer.register_step_post_hook(self._after_step)

    # --- what there is -------------------------------------------------------------------------------------------

    @property
    def low_rank(self) -> dict[str, AbstractLowRankLayer]:
        """The candidates that have become low-rank, by name, in the order in which they did."""
        return {name: self._layer(name) for name in self._low_rank}

    @property
    def dense(self) -> dict[str, nn.Module]:
        """The candidates that are dense still, by name."""
        return {name: self._layer(name) for name in self.candidates if name not in self._low_rank}

    def on_rank_event(self, callback: Callable[[list[RankEvent]], None]) -> None:
        """Call ``callback(events)`` after every refresh that changed a layer, with one event per layer."""
        self._callbacks.append(callback)

    def remove(self) -> None:
        """Let go of the optimizer; the model stays as it is."""
        self._handle.remove()

    def _layer(self, name: str) -> Any:
        return self.model.get_submodule(name)

    @property
    def _bases_stay(self) -> bool:
        """Whether low-rank layers have a core between bases that only a refresh changes, and their ranks with it."""
        return self.trained == "core" and not isinstance(self.optimizer, LowRankOptimizer)

    # --- within the step -----------------------------------------------------------------------------------------

    @torch.no_grad()
    def _after_step(self, *_: Any) -> None:
        self.steps += 1
        self._look()
        if self._is_due():
            self.refresh()

    def _look(self) -> None:
        """Show the dense weights that are not ready to the switch, if it looks now."""
        waiting = [name for name in self.dense if name not in self.ready]
        if not waiting or not self.switch.looks(self.steps):
            return
        weights = {name: self.candidates[name].matrix(self._layer(name).weight) for name in waiting}
        found, self._memory = self.switch.look(self.steps, weights, self._memory)
        self.ready |= found
        if found and self._first is None:
            self._first = self.steps

    def _is_due(self) -> bool:
        if self.every is None:
            return bool(self._open())
        return self._first is not None and (self.steps - self._first) % self.every == 0

    def _open(self) -> list[str]:
        """Return the ready layers whose ranks are decided here from now on."""
        if self.every is None:
            closed = [*self.held]
        else:
            closed = [] if self._bases_stay else self._low_rank
        return [name for name in self.candidates if name in self.ready and name not in closed]

    @torch.no_grad()
    def refresh(self) -> list[RankEvent]:
        """Cut the ranks of all ready layers in the window now, and make those low-rank for which it pays.

        A failure leaves model and optimizer as they were.
        """
        share = 1.0 if self.window is None else self.window
        reached = self._reached + ceil(share * len(self.candidates) - ROUNDING)
        points = {name: self._point(name) for name in self._open()}
        planned = self._plan(points, [*self.candidates][::-1][:reached])
        events = [event for event in planned if self._carries_out(event)]
        self._move({e.layer: factors.truncate(points[e.layer], rank=e.new_rank) for e in events})
        self.held |= {event.layer: event.new_rank for event in planned}
        self._reached = reached
        self._note_idleness(planned)
        for callback in self._callbacks if events else ():
            callback(events)
        return events

    def _note_idleness(self, planned: list[RankEvent]) -> None:
        """Say once that no rank is cut far enough for any layer to become low-rank."""
        if self._low_rank or self._reached < len(self.candidates) or not planned:
            return
        self._idle += 1
        if self._idle == PATIENCE:
            ranks = [f"{e.layer} {e.new_rank} (pays up to {self.candidates[e.layer].most})" for e in planned]
            logger.warning(
                "step %d: every layer is dense still, since the ranks that are kept save nothing: %s. Cut more (larger "
                "beta, another rank_policy such as Budget(0.5)), or give keep_dense=False.",
                self.steps,
                ", ".join(ranks[:8]),
            )

    def _point(self, name: str) -> LowRankFactors:
        """Return the weight of a layer as diagonalised factors in at least float32: of full rank while it is dense."""
        layer, candidate = self._layer(name), self.candidates[name]
        if name not in self._low_rank:
            return factors.from_dense(candidate.matrix(layer.weight), rank=candidate.full)
        at = layer.factors()
        return factors.diagonalise(LowRankFactors(linalg.widen(at.U), linalg.widen(at.S), linalg.widen(at.V)))

    def _plan(self, points: Mapping[str, LowRankFactors], window: Iterable[str]) -> list[RankEvent]:
        """Return what is to happen to layers in the window that are dense still, or whose rank is to fall."""
        spectra = [LayerSpectrum(name, point.sigma.double().cpu(), point.shape) for name, point in points.items()]
        others = deployed_parameters(self.model) - sum(s.parameters(len(s.sigma)) for s in spectra)
        context = PlanContext(self.steps, self.dense_parameters, others)
        decisions = self.rank_policy.plan(spectra, context) if spectra else []
        found = {}
        for spectrum, decision in zip(spectra, decisions, strict=True):
            name, now = spectrum.name, len(spectrum.sigma)
            held = self.held.get(name, now)
            least = 1 if self.largest_cut is None else max(1, floor(held * (1 - self.largest_cut) + ROUNDING))
            rank = min(held, max(decision.rank, least))
            if rank < held or name not in self._low_rank:
                tails = linalg.tails(spectrum.sigma)
                tail = float(tails[rank] / tails[0].clamp_min(TINY))
                found[name] = RankEvent(self.steps, name, now, rank, 0, tail, decision.reason)
        return [found[name] for name in window if name in found]

    def _carries_out(self, event: RankEvent) -> bool:
        pays = self.candidates[event.layer].pays(event.new_rank)
        return pays or not self.keep_dense or event.layer in self._low_rank

    # --- changes -------------------------------------------------------------------------------------------------

    def _move(self, points: Mapping[str, LowRankFactors]) -> None:
        """Take layers to these factors, and what the optimizer holds of them; first, whatever could fail."""
        self._check_held(points)
        old = {name: self._trained(name) for name in points}
        states = {name: self._carried(name, old[name], point) for name, point in points.items()}
        form = "core" if self._bases_stay else "pair"
        dense = {name: self._layer(name) for name in points if name not in self._low_rank}
        check_replaceable(self.model, dense)
        built = {name: self.candidates[name].build(layer, points[name], form=form) for name, layer in dense.items()}
        put_in_place(self.model, {layer: built[name] for name, layer in dense.items()}, verb="the dense start")
        self._low_rank += built
        if not self._frozen_noted:
            self._frozen_noted = note_frozen(self.optimizer, built, step=self.steps)
        for name, point in points.items():
            if name not in built:
                self._layer(name).set_factors(point)
            self._hand_over(name, old[name], states[name])

    def _trained(self, name: str) -> nn.Parameter:
        """Return what a refresh would replace: the dense weight, or the core."""
        layer = self._layer(name)
        return layer.S if name in self._low_rank else layer.weight

    def _carried(self, name: str, old: nn.Parameter, point: LowRankFactors) -> State:
        """Return the optimizer's state of a layer at a point to come; an empty one where it starts afresh."""
        if self.state_after == "fresh":
            return {}
        state = self.optimizer.state.get(old, {})
        if name not in self._low_rank:
            return transported(state, old, U=point.U, V=point.V, as_matrix=self.candidates[name].matrix)
        at = self._layer(name).factors()
        P, Q = linalg.widen(at.U).mT @ point.U, linalg.widen(at.V).mT @ point.V  # (r0, r1)
        return transported(state, old, U=P, V=Q, as_matrix=linalg.widen)

    def _hand_over(self, name: str, old: nn.Parameter, state: State) -> None:
        """Give the optimizer what is trained of a low-rank layer in the place of what was trained before."""
        layer = self._layer(name)
        if isinstance(self.optimizer, LowRankOptimizer):
            join(self.optimizer, old, layer)
        elif self._bases_stay:
            exchange(self.optimizer, old, {f"{name}.S": layer.S}, [state])
        else:
            exchange(self.optimizer, old, {f"{name}.A": layer.A, f"{name}.B": layer.B}, [{}, {}])

    def _check_held(self, names: Iterable[str]) -> None:
        """Raise if the optimizer does not hold what a refresh would replace."""
        if loose := [name for name in names if holder(self.optimizer, self._trained(name)) is None]:
            raise ValueError(
                f"the optimizer ({type(self.optimizer).__name__}) does not hold the weights of {', '.join(loose)}, so "
                "what they become would not be trained. Give it all parameters of the model, or exclude these layers "
                "with exclude_modules."
            )

    # --- interruption --------------------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """Return everything needed to go on: tensors, numbers and names only."""
        return {
            "candidates": self._described(),
            "steps": self.steps,
            "first": self._first,
            "reached": self._reached,
            "ready": sorted(self.ready),
            "held": dict(self.held),
            "memory": dict(self._memory),
            "low_rank": [[name, layer.rank] for name, layer in self.low_rank.items()],
        }

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Take over a saved state: layers that had become low-rank do so now, at the ranks they had.

        Call this first, on a model and an optimizer as they were at the start; then load the model's state, then the
        optimizer's.

        Raises:
            ValueError: The state is of other layers, or layers have become low-rank here already. Nothing was changed.
        """
        if state_dict["candidates"] != self._described() or self._low_rank:
            why = "layers are low-rank here already" if self._low_rank else "it is of other layers or another form"
            raise ValueError(f"the saved state does not fit: {why}. Build model, optimizer and DenseStart as before.")
        ranks = dict(state_dict["low_rank"])
        self._move({name: factors.truncate(self._point(name), rank=rank) for name, rank in ranks.items()})
        self.steps, self._first, self._reached = state_dict["steps"], state_dict["first"], state_dict["reached"]
        self.ready, self.held = frozenset(state_dict["ready"]), dict(state_dict["held"])
        self._memory = dict(state_dict["memory"])

    def _described(self) -> dict[str, list[Any]]:
        """Return what a saved state has to agree with."""
        form = "core" if self._bases_stay else "pair"
        return {name: [*candidate.shape, form] for name, candidate in self.candidates.items()}
