"""A rank change as one transaction: plan, check, cut, grow, carry the state along, record."""

import zlib
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from dynarank import factors, linalg
from dynarank.events import RankEvent
from dynarank.factorize import deployed_parameters
from dynarank.factors import FactorPair, LowRankFactors
from dynarank.integrators.base import AbstractIntegrator, Point, State
from dynarank.layers._factored import AbstractFactoredLayer, ModeChange, own_name
from dynarank.optim._layer_state import shapes, stored
from dynarank.optim._prices import decide
from dynarank.ranks.base import Decision, LayerSpectrum, PlanContext

if TYPE_CHECKING:
    from dynarank.optim.low_rank_optimizer import LowRankOptimizer

PATIENCE = 3  # rank events in a row that may be postponed without a warning
POSTPONED = (
    "factors could not change their shape %d times in a row; last: %s. Ranks are cut, but no memory is freed and they "
    "grow into spare rows only. Evaluate under torch.no_grad(), delete old losses and outputs before optimizer.step(), "
    "or factorise with rank_multiple=8."
)


class Planned(NamedTuple):
    """Where a layer is, diagonalised, and what is decided for its matrix and for its other modes, if it has any."""

    at: LowRankFactors
    decision: Decision
    modes: Mapping[str, Decision]


Plan = Mapping[str, Planned]


@dataclass(frozen=True)
class Move:
    """Where a rank event takes one layer.

    Args:
        name: Qualified name of the layer.
        layer: The layer itself.
        at: Where it is, diagonalised.
        decision: What the policy decided.
        point: Where it goes.
        state: The integrator's state there.
        modes: What happens to its other modes, if it has any.
        stays: Whether ``point`` is what the layer holds already, and its other modes stay.
    """

    name: str
    layer: AbstractFactoredLayer
    at: LowRankFactors
    decision: Decision
    point: FactorPair
    state: State
    modes: Mapping[str, ModeChange] = field(default_factory=dict)
    stays: bool = False

    @property
    def fits(self) -> bool:
        """Whether the layer can take the new point without a change of shape."""
        return self.layer.fits(self.point.rank, self.modes)


# --- plan --------------------------------------------------------------------------------------------------------


def plan(optimizer: "LowRankOptimizer") -> Plan:
    """Return, for every trainable layer, where it is and what the policy decides; nothing is changed."""
    readings = {n: _read(optimizer, n, layer) for n, layer in optimizer.layers.items() if _is_trainable(layer)}
    spectra = [s for name, at in readings.items() for s in _spectra(optimizer, name, at)]
    decisions = decide(optimizer.rank_policy, plan_context(optimizer), spectra, optimizer.layers) if spectra else []
    found = dict(zip((spectrum.name for spectrum in spectra), decisions, strict=True))
    return {name: _planned(optimizer.layers[name], name, at, found) for name, at in readings.items()}


def _planned(layer: AbstractFactoredLayer, name: str, at: LowRankFactors, decisions: Mapping[str, Decision]) -> Planned:
    modes = {mode: decisions[f"{name}[{mode}]"] for mode in layer.mode_names}
    return Planned(at, decisions[own_name(name, layer)], modes)


def decisions_of(optimizer: "LowRankOptimizer", plan: Plan) -> dict[str, Decision]:
    """Return the decisions of a plan by the name of what they are about: a layer, or one of its modes."""
    found: dict[str, Decision] = {}
    for name, planned in plan.items():
        found[own_name(name, optimizer.layers[name])] = planned.decision
        found |= {f"{name}[{mode}]": decision for mode, decision in planned.modes.items()}
    return found


def agree(optimizer: "LowRankOptimizer", plan: Plan) -> Plan:
    """Return the plan with the decisions of process 0."""
    decisions = optimizer.replicas.agree(decisions_of(optimizer, plan), step=optimizer.steps)
    return {name: _planned(optimizer.layers[name], name, at, decisions) for name, (at, _, _) in plan.items()}


def keep(optimizer: "LowRankOptimizer", names: Iterable[str]) -> Plan:
    """Return the plan that gives layers the rank they have; inside a cycle of its integrator, that of its end."""
    readings = {name: _read(optimizer, name, optimizer.layers[name]) for name in names}
    return {
        name: Planned(
            at,
            Decision(_own_rank(optimizer, name) or at.rank, 0, "kept"),
            {m: Decision(len(s.sigma), 0, "kept") for m, s in optimizer.layers[name].modes().items()},
        )
        for name, at in readings.items()
    }


def plan_context(optimizer: "LowRankOptimizer") -> PlanContext:
    """Return what rank policies know about the run; frozen layers count as they are."""
    layers = optimizer.layers.values()
    sizes = {layer: layer.deployed_parameters() for layer in layers}
    now = deployed_parameters(optimizer.model)
    dense = now + sum(layer.dense_parameters for layer in layers) - sum(sizes.values())
    other = now - sum(size for layer, size in sizes.items() if _is_trainable(layer))
    return PlanContext(optimizer.steps, dense, other)


def _is_trainable(layer: AbstractFactoredLayer) -> bool:
    return all(p.requires_grad for p in stored(layer))


def _read(optimizer: "LowRankOptimizer", name: str, layer: AbstractFactoredLayer) -> LowRankFactors:
    point, state = optimizer.look(name, layer)
    if isinstance(point, LowRankFactors):
        return factors.diagonalise(point)
    in_gauge = optimizer.integrator.keeps_gauge and state is not None
    return factors.read_balanced(point) if in_gauge else factors.read_pair(point)


def _spectra(optimizer: "LowRankOptimizer", name: str, at: LowRankFactors) -> list[LayerSpectrum]:
    """Return what a policy sees of a layer: its matrix, and the unfoldings along its other modes."""
    layer, kept = optimizer.layers[name], optimizer.kept_ranks
    sigma, own = at.sigma.detach().double().cpu(), own_name(name, layer)
    price, *prices = layer.prices(layer.all_ranks)
    spectra = [LayerSpectrum(own, sigma, at.shape, _own_rank(optimizer, name), kept.get(own), price)]
    for (mode, seen), price in zip(layer.modes().items(), prices, strict=True):
        sigma, also = seen.sigma.detach().double().cpu(), f"{name}[{mode}]"
        spectra.append(LayerSpectrum(also, sigma, seen.shape, kept=kept.get(also), price=price))
    return spectra


def _own_rank(optimizer: "LowRankOptimizer", name: str) -> int | None:
    """Return the rank outside a cycle: an integrator that augments the bases keeps it in its state as ``rank``."""
    _, state = optimizer.look(name, optimizer.layers[name])
    return int(state["rank"]) if state and "rank" in state else None


# --- change ------------------------------------------------------------------------------------------------------


def change_ranks(optimizer: "LowRankOptimizer", plan: Plan, *, grow: bool) -> tuple[list[RankEvent], str | None]:
    """Carry out a plan: everything is computed and checked before the first layer changes.

    Args:
        optimizer: Whose layers change.
        plan: What to do with each layer.
        grow: Whether the candidates of the plan are added.

    Returns:
        What happened to each layer, and why no layer could change its capacity, or None.
    """
    moves = [
        _move(optimizer, name, at, d, _changes(modes, grow=grow), grow=d.candidates if grow else 0)
        for name, (at, d, modes) in plan.items()
    ]
    with optimizer.replicas.resizing({m.name: m.layer for m in moves if not m.fits}) as refusal:
        late = {m.name for m in moves if refusal and not m.fits and m.layer.form == "pair"}  # no swap at all, or all
        moves = [_within_capacity(optimizer, m) if m.name in late else m for m in moves]
        for move in moves:
            _check_state(optimizer.integrator, move)
        events = [
            event for m in moves for event in _events(optimizer, m, plan[m.name], refusal if m.name in late else None)
        ]
        for move in moves:
            if not move.stays or (refusal is None and not move.fits):
                towards = optimizer.integrator.directions(move.state, move.point) if move.modes and move.state else None
                put = partial(move.layer.change_ranks_to, modes=move.modes, resize=refusal is None, towards=towards)
                optimizer.write(move.name, move.layer, move.point, move.state, put)
    return events, refusal


def _changes(modes: Mapping[str, Decision], *, grow: bool) -> dict[str, ModeChange]:
    return {mode: ModeChange(d.rank, d.candidates if grow else 0) for mode, d in modes.items()}


def _move(
    optimizer: "LowRankOptimizer",
    name: str,
    at: LowRankFactors,
    decision: Decision,
    modes: Mapping[str, ModeChange],
    *,
    grow: int,
) -> Move:
    layer = optimizer.layers[name]
    old, state = optimizer.look(name, layer)
    grow = min(grow, layer.max_rank - decision.rank)
    same = decision.rank == at.rank and not grow and (state is not None or layer.fits(at.rank))
    if same and isinstance(old, FactorPair):
        held = layer.modes()
        idle = all(c.rank == len(held[mode].sigma) and not c.candidates for mode, c in modes.items())
        if idle or state is not None:
            return Move(name, layer, at, decision, old, state or {}, modes, stays=idle)
    kept = factors.truncate(at, rank=decision.rank)
    if grow:
        kept = _grown(kept, grow, *_ways(optimizer, name, old, state, grow))
    new = factors.to_pair(kept)
    state = optimizer.integrator.init(new) if state is None else optimizer.integrator.transport(state, old, new)
    return Move(name, layer, at, decision, new, state, modes)


def _within_capacity(optimizer: "LowRankOptimizer", move: Move) -> Move:
    room = max(move.layer.capacity - move.decision.rank, 0)
    grown = move.point.rank - move.decision.rank
    modes = {mode: ModeChange(change.rank, 0) for mode, change in move.modes.items()}
    return _move(optimizer, move.name, move.at, move.decision, modes, grow=min(grown, room))


def _ways(
    optimizer: "LowRankOptimizer", name: str, old: Point, state: State | None, count: int
) -> tuple[Tensor, Tensor]:
    """Return directions to grow along: those the integrator knows, then random ones.

    The random ones are drawn from the step and the layer's name alone: the same on every process and after a resume.
    """
    generator = torch.Generator().manual_seed(zlib.crc32(f"{name}@{optimizer.steps}".encode()))
    like = old.A if isinstance(old, FactorPair) else old.U
    drawn = [linalg.random_orthonormal((size, min(count, size)), generator=generator, like=like) for size in old.shape]
    known = optimizer.integrator.directions(state, old) if state else None
    left, right = drawn if known is None else (torch.cat(pair, -1) for pair in zip(known, drawn, strict=True))
    return left, right


def _grown(kept: LowRankFactors, count: int, left: Tensor, right: Tensor) -> LowRankFactors:
    left, right = linalg.complement(kept.U, left, count), linalg.complement(kept.V, right, count)
    count = min(left.shape[-1], right.shape[-1])
    return factors.augment(kept, left=left[:, :count], right=right[:, :count])


def _check_state(integrator: AbstractIntegrator, move: Move) -> None:
    """A state of the wrong shape would train on in silence, or write beyond its memory in a fused step."""
    found, needed = shapes(move.state), shapes(integrator.init(move.point))
    if not move.stays and found != needed:
        raise RuntimeError(
            f"{move.name}: {type(integrator).__name__}.transport returned a state of shapes {found}, but rank "
            f"{move.point.rank} needs {needed}. Nothing was changed."
        )


def _events(optimizer: "LowRankOptimizer", move: Move, planned: Planned, refusal: str | None) -> Iterator[RankEvent]:
    """Yield an event for the matrix and one for each of the other modes."""
    own = own_name(move.name, move.layer)
    yield _event(optimizer.steps, own, move.at.sigma, move.decision, move.point.rank - move.decision.rank, refusal)
    held = move.layer.modes()
    for mode, decision in planned.modes.items():
        tried = move.modes[mode].candidates
        yield _event(optimizer.steps, f"{move.name}[{mode}]", held[mode].sigma, decision, tried, refusal)


def _event(step: int, name: str, sigma: Tensor, decision: Decision, candidates: int, refusal: str | None) -> RankEvent:
    rank, tail = decision.rank, linalg.tails(sigma)
    lost = float(tail[rank] / tail[0]) if float(tail[0]) > 0 else 0.0
    reason = decision.reason + (f"; capacity stays for now: {refusal}" if refusal else "")
    return RankEvent(step, name, len(sigma), rank, candidates, lost, reason)
