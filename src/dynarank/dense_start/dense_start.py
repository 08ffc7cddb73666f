"""Networks that start with full rank: each layer goes low-rank when it is ready and a cut pays."""

import re
from collections.abc import Callable, Mapping
from math import ceil
from typing import Any, Literal, final

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from dynarank import factors, linalg
from dynarank.dense_start._candidates import find_candidates
from dynarank.dense_start._host import State, check_host, exchange, holder, leave, turned
from dynarank.events import RankEvent
from dynarank.factorize import ConvForm, deployed_parameters, factorize_
from dynarank.factorize.sites import refuse_wrapped
from dynarank.factors import LowRankFactors
from dynarank.layers.base import AbstractLowRankLayer
from dynarank.optim.low_rank_optimizer import LowRankOptimizer
from dynarank.ranks.base import AbstractRankPolicy, LayerSpectrum, PlanContext
from dynarank.switches.base import AbstractSwitch

Trained = Literal["core", "factors"]
StateAfter = Literal["fresh", "transported"]
TINY = torch.finfo(torch.float64).tiny


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
        every: Optimizer steps between refreshes, from the first switch on. None: a layer is cut once, when it is ready.
        trained: What a torch optimizer trains of a low-rank layer.
        window: Part of the layers by which the window of refreshed layers grows at each refresh, the last layers of
            the model first. None: all layers at once.
        largest_cut: Largest part of its rank that a layer loses at a refresh. None: no limit.
        keep_dense: Whether a layer stays dense until a cut makes it smaller. If not, it becomes low-rank as soon as it
            is ready, at full rank if need be, and is larger than dense until its rank falls.
        state: Whether the optimizer's state of a parameter with new bases starts ``"fresh"``, as that of any new
            parameter, or is ``"transported"`` to the new bases.
        steps: Optimizer steps of the whole run, if known, so that a switch that never comes is refused.
        target_modules: Layers that may go low-rank, as in `factorize_`.
        exclude_modules: Layers that stay dense, as in `factorize_`.
        include_head: Whether the classifier head may.
        conv_form: ``"matrix"`` or ``"spatial"``, as in `factorize_`.

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
    ) -> None:
        _check(every=every, trained=trained, window=window, largest_cut=largest_cut, state=state)
        check_host(optimizer)
        refuse_wrapped(model, "a dense start")
        _refuse_processes()
        _check_switch(switch, steps)
        if state == "transported" and (trained != "core" or isinstance(optimizer, LowRankOptimizer)):
            raise ValueError(
                "state='transported' goes with trained='core' and a torch optimizer: two factors have none to inherit."
            )
        self.model, self.optimizer = model, optimizer
        self.switch, self.rank_policy, self.every = switch, rank_policy, every
        self.trained, self.state_after = trained, state
        self.window, self.largest_cut, self.keep_dense = window, largest_cut, keep_dense
        self.conv_form: ConvForm = conv_form
        self.candidates = find_candidates(
            model,
            {
                "target_modules": target_modules,
                "exclude_modules": exclude_modules,
                "include_head": include_head,
                "conv_form": conv_form,
            },
        )
        self._check_held(self.candidates)
        self.dense_parameters = deployed_parameters(model)
        self.steps = 0
        self.ready: set[str] = set()
        self.held = {name: candidate.full for name, candidate in self.candidates.items()}  # ranks, virtual while dense
        self._memory = switch.init()
        self._first: int | None = None
        self._reached = 0  # layers in the window
        self._callbacks: list[Callable[[list[RankEvent]], None]] = []
        self._handle = optimizer.register_step_post_hook(self._after_step)

    # --- what there is -------------------------------------------------------------------------------------------

    @property
    def low_rank(self) -> dict[str, AbstractLowRankLayer]:
        """The candidates that have become low-rank, by name."""
        return {name: layer for name, layer in self._layers() if isinstance(layer, AbstractLowRankLayer)}

    @property
    def dense(self) -> dict[str, nn.Module]:
        """The candidates that are dense still, by name."""
        return {name: layer for name, layer in self._layers() if not isinstance(layer, AbstractLowRankLayer)}

    def on_rank_event(self, callback: Callable[[list[RankEvent]], None]) -> None:
        """Call ``callback(events)`` after every refresh that changed a layer, with one event per layer."""
        self._callbacks.append(callback)

    def remove(self) -> None:
        """Let go of the optimizer; the model stays as it is."""
        self._handle.remove()

    def _layers(self) -> list[tuple[str, Any]]:
        return [(name, self.model.get_submodule(name)) for name in self.candidates]

    # --- within the step -----------------------------------------------------------------------------------------

    @torch.no_grad()
    def _after_step(self, *_: Any) -> None:
        self.steps += 1
        new = self._look()
        if self._first is None:
            return
        if new if self.every is None else (self.steps - self._first) % self.every == 0:
            self.refresh()

    def _look(self) -> bool:
        """Show the dense weights to the switch, if it looks now; return whether a layer became ready."""
        dense = self.dense
        if not dense or not self.switch.looks(self.steps):
            return False
        weights = {name: self.candidates[name].matrix(layer.weight) for name, layer in dense.items()}  # type: ignore[arg-type]
        found, self._memory = self.switch.look(self.steps, weights, self._memory)
        new = found - self.ready
        self.ready |= found
        if new and self._first is None:
            self._first = self.steps
        return bool(new)

    @torch.no_grad()
    def refresh(self) -> list[RankEvent]:
        """Cut the ranks of all ready layers in the window now, and make those low-rank for which it pays."""
        self._reached += len(self.candidates) if self.window is None else ceil(self.window * len(self.candidates))
        wanted = self._wanted()
        reached = list(self.candidates)[::-1][: self._reached]
        changes = {name: wanted[name] for name in reached if name in wanted}
        self._check_held(changes)
        cuts = {name: change for name, change in changes.items() if name in self.low_rank}
        switches = {name: change for name, change in changes.items() if name not in cuts}
        switches = {n: c for n, c in switches.items() if self.candidates[n].pays(c.new_rank) or not self.keep_dense}
        self.held |= {name: change.new_rank for name, change in changes.items()}
        for name, change in cuts.items():
            self._cut(name, change.new_rank)
        if switches:
            self._convert({name: change.new_rank for name, change in switches.items()})
        events = [*cuts.values(), *switches.values()]
        for callback in self._callbacks if events else ():
            callback(events)
        return events

    def _wanted(self) -> dict[str, RankEvent]:
        """Return what is to happen to each layer that is ready, and dense still or of a rank that is to fall."""
        spectra = [
            LayerSpectrum(name, linalg.svd(self._matrix(name))[1].double().cpu(), candidate.shape)
            for name, candidate in self.candidates.items()
            if name in self.ready and not self._taken_over(name)
        ]
        others = deployed_parameters(self.model) - sum(self._size(s.name) for s in spectra)
        plan = self.rank_policy.plan(spectra, PlanContext(self.steps, self.dense_parameters, others)) if spectra else []
        found = {}
        for spectrum, decision in zip(spectra, plan, strict=True):
            name, held = spectrum.name, self.held[spectrum.name]
            least = 1 if self.largest_cut is None else ceil(held * (1 - self.largest_cut))
            rank = min(held, max(decision.rank, least))
            if rank < held or name not in self.low_rank:
                tail = float(linalg.tails(spectrum.sigma)[rank] / spectrum.sigma.norm().clamp_min(TINY))
                found[name] = RankEvent(self.steps, name, len(spectrum.sigma), rank, 0, tail, decision.reason)
        return found

    def _matrix(self, name: str) -> Tensor:
        """Return a matrix with the singular values of the layer: its weight, or the core."""
        layer: Any = self.model.get_submodule(name)
        if isinstance(layer, AbstractLowRankLayer):
            return linalg.widen(layer.factors().S)
        return self.candidates[name].matrix(layer.weight)

    def _size(self, name: str) -> int:
        layer: Any = self.model.get_submodule(name)
        return layer.deployed_parameters() if isinstance(layer, AbstractLowRankLayer) else layer.weight.numel()

    def _taken_over(self, name: str) -> bool:
        """Whether the ranks of a layer are no longer decided here."""
        bases_stay = self.trained == "core" and not isinstance(self.optimizer, LowRankOptimizer)
        return name in self.low_rank and not bases_stay

    # --- changes -------------------------------------------------------------------------------------------------

    def _convert(self, ranks: Mapping[str, int]) -> None:
        """Make dense layers low-rank; in the optimizer, what is trained of them takes the place of their weights."""
        before: dict[str, Any] = {name: self.model.get_submodule(name).weight for name in ranks}
        states = {name: self.optimizer.state.get(weight, {}) for name, weight in before.items()}
        factorize_(
            self.model,
            target_modules="|".join(f"(?:{re.escape(name)})" for name in ranks),
            rank_pattern=dict(ranks),
            keep_dense_above_break_even=False,
            conv_form=self.conv_form,
        )
        for name, weight in before.items():
            self._hand_over(name, weight, states[name])

    def _hand_over(self, name: str, weight: nn.Parameter, state: State) -> None:
        layer: Any = self.model.get_submodule(name)
        if isinstance(self.optimizer, LowRankOptimizer):
            leave(self.optimizer, weight)
            self.optimizer.add_param_group({"params": [layer.A, layer.B]})
        elif self.trained == "factors":
            exchange(self.optimizer, weight, {f"{name}.A": layer.A, f"{name}.B": layer.B}, [{}, {}])
        else:
            layer.set_factors(layer.factors(), form="core")
            as_matrix, U, V = self.candidates[name].matrix, layer.U, layer.V
            carried = self._carried(
                state,
                weight.shape,
                lambda average: U.mT @ as_matrix(average).to(U) @ V,
                lambda square: U.square().mT @ as_matrix(square).to(U) @ V.square(),
            )
            exchange(self.optimizer, weight, {f"{name}.S": layer.S}, [carried])

    def _cut(self, name: str, rank: int) -> None:
        """Turn the bases to the singular directions of the core and drop the last."""
        layer: Any = self.model.get_submodule(name)
        old, at = layer.S, layer.factors()
        new = factors.truncate(factors.diagonalise(_widened(at)), rank=rank)
        P, Q = _widened(at).U.mT @ new.U, _widened(at).V.mT @ new.V  # (r0, r1)
        state = self.optimizer.state.get(old, {})
        layer.set_factors(new, form="core")
        carried = self._carried(
            state,
            old.shape,
            lambda average: (P.mT @ linalg.widen(average) @ Q).to(old.dtype),
            lambda square: (P.square().mT @ linalg.widen(square) @ Q.square()).to(old.dtype),
        )
        exchange(self.optimizer, old, {f"{name}.S": layer.S}, [carried])

    def _carried(self, state: State, shape: torch.Size, average: Any, square: Any) -> State:
        return turned(state, shape, average=average, square=square) if self.state_after == "transported" else {}

    def _check_held(self, names: Any) -> None:
        """Raise if the optimizer does not hold what it is to train."""
        loose = []
        for name in names:
            layer: Any = self.model.get_submodule(name)
            trained = (layer.A, layer.B, layer.S) if isinstance(layer, AbstractLowRankLayer) else (layer.weight,)
            if any(p is not None and holder(self.optimizer, p) is None for p in trained):
                loose.append(name)
        if loose:
            raise ValueError(
                f"the optimizer ({type(self.optimizer).__name__}) does not hold the weights of {', '.join(loose)}, so "
                "what they become would not be trained. Give it all parameters of the model, or exclude these layers "
                "with exclude_modules."
            )

    # --- interruption --------------------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """Return everything needed to go on: tensors, numbers and names only."""
        return {
            "steps": self.steps,
            "first": self._first,
            "reached": self._reached,
            "ready": sorted(self.ready),
            "held": dict(self.held),
            "memory": dict(self._memory),
            "layers": {name: layer.rank for name, layer in self.low_rank.items()},
        }

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Take over a saved state: layers that had become low-rank do so now, at the ranks they had.

        Call this first, on a model and an optimizer as they were at the start; then load the model's state, then the
        optimizer's.

        Raises:
            ValueError: The state is of other layers, or layers have become low-rank here already.
        """
        unknown = sorted({*state_dict["held"]} ^ {*self.candidates})
        if unknown or self.low_rank:
            why = f"{', '.join(unknown)} are in one only" if unknown else "layers are low-rank here already"
            raise ValueError(f"the saved state does not fit: {why}. Build model, optimizer and DenseStart afresh.")
        self.steps, self._first, self._reached = state_dict["steps"], state_dict["first"], state_dict["reached"]
        self.ready, self.held = set(state_dict["ready"]), dict(state_dict["held"])
        self._memory = dict(state_dict["memory"])
        if state_dict["layers"]:
            self._convert(state_dict["layers"])


def _widened(at: LowRankFactors) -> LowRankFactors:
    return LowRankFactors(linalg.widen(at.U), linalg.widen(at.S), linalg.widen(at.V))


# --- checks ------------------------------------------------------------------------------------------------------


def _check(*, every: int | None, trained: str, window: float | None, largest_cut: float | None, state: str) -> None:
    if every is not None and every < 1:
        raise ValueError(f"every must be at least 1, or None for one cut only, got {every}.")
    for name, value, allowed in (
        ("trained", trained, ("core", "factors")),
        ("state", state, ("fresh", "transported")),
    ):
        if value not in allowed:
            raise ValueError(f"{name} must be {' or '.join(map(repr, allowed))}, got {value!r}.")
    if window is not None and not 0 < window <= 1:
        raise ValueError(f"window must be above 0 and at most 1, got {window}.")
    if largest_cut is not None and not 0 < largest_cut <= 1:
        raise ValueError(f"largest_cut must be above 0 and at most 1, got {largest_cut}.")


def _check_switch(switch: AbstractSwitch, steps: int | None) -> None:
    if steps is not None and not any(switch.looks(step) for step in range(1, steps)):
        raise ValueError(
            f"{switch} never looks before the end of a run of {steps} steps: no layer would ever go low-rank. Let it "
            "look earlier, or train for longer."
        )


def _refuse_processes() -> None:
    distributed = torch.distributed
    if distributed.is_available() and distributed.is_initialized() and distributed.get_world_size() > 1:
        raise RuntimeError(
            f"a dense start works in one process, and this run has {distributed.get_world_size()}: layers that change "
            "on the way would part. Train dense first, then use factorize_ and LowRankOptimizer."
        )
