"""A rank change as one transaction: plan, check, cut, grow, carry the state along, record."""

from typing import TYPE_CHECKING, Any

from torch import Tensor

from dynarank import factors, linalg
from dynarank.events import RankEvent
from dynarank.factors import LowRankFactors
from dynarank.layers.base import AbstractLowRankLayer
from dynarank.ranks.base import Decision, LayerSpectrum, PlanContext

if TYPE_CHECKING:
    from dynarank.optim.low_rank_optimizer import LowRankOptimizer


def plan(optimizer: "LowRankOptimizer") -> dict[str, Decision]:
    """Return the policy's decision for every layer; nothing is changed."""
    return {name: decision for name, (_, decision) in _planned(optimizer).items()}


def _planned(optimizer: "LowRankOptimizer") -> dict[str, tuple[LowRankFactors, Decision]]:
    readings = {name: _read(optimizer, name, layer) for name, layer in optimizer.layers.items()}
    spectra = [
        LayerSpectrum(name, at.sigma.detach().double().cpu(), optimizer.layers[name].matrix_shape)
        for name, at in readings.items()
    ]
    decisions = optimizer.rank_policy.plan(spectra, optimizer.plan_context())
    return {name: (at, d) for (name, at), d in zip(readings.items(), decisions, strict=True)}


def _read(optimizer: "LowRankOptimizer", name: str, layer: AbstractLowRankLayer) -> LowRankFactors:
    point = layer.point()
    if isinstance(point, LowRankFactors):
        return factors.diagonalise(point)
    return factors.read_balanced(point) if optimizer._trusts(name, layer) else factors.read_pair(point)


def change_ranks(optimizer: "LowRankOptimizer", *, last: bool) -> list[RankEvent]:
    """Hold a rank event and return what happened to each layer. A failure leaves everything as it was."""
    planned = _planned(optimizer)
    wanted = {name: d.rank + (0 if last else d.candidates) for name, (_, d) in planned.items()}
    refusals = [
        why
        for name, layer in optimizer.layers.items()
        if not layer.fits(wanted[name]) and (why := layer.resize_refusal()) is not None
    ]
    moves = []
    for name, (at, decision) in planned.items():
        layer = optimizer.layers[name]
        room = layer.capacity - decision.rank if refusals else layer.max_rank - decision.rank
        grow = 0 if last else min(decision.candidates, max(room, 0))
        moves.append((name, layer, at, decision, *_moved(optimizer, name, layer, at, decision.rank, grow)))
    return [_apply(optimizer, *move, resize=not refusals) for move in moves]


def _moved(
    optimizer: "LowRankOptimizer", name: str, layer: AbstractLowRankLayer, at: LowRankFactors, rank: int, grow: int
) -> tuple[Any, dict[str, Tensor] | None]:
    """Return the new point and the state that belongs to it."""
    old = factors.to_pair(at)
    kept = factors.truncate(at, rank=rank)
    state = optimizer.state_of(layer) if optimizer._trusts(name, layer) else None
    ways = optimizer.integrator.directions(state, old) if state and grow else None
    if ways is not None:
        left, right = (linalg.complement(b, w, grow) for b, w in zip((kept.U, kept.V), ways, strict=True))
        count = min(left.shape[-1], right.shape[-1])
        kept = factors.augment(kept, left=left[:, :count], right=right[:, :count])
    new = factors.to_pair(kept)
    return new, optimizer.integrator.transport(state, old, new) if state else None


def _apply(
    optimizer: "LowRankOptimizer",
    name: str,
    layer: AbstractLowRankLayer,
    at: LowRankFactors,
    decision: Decision,
    point: Any,
    state: dict[str, Tensor] | None,
    *,
    resize: bool,
) -> RankEvent:
    old_rank = at.rank
    optimizer.state.pop(optimizer_key(layer), None)
    layer.set_factors(point, resize=resize)
    if state is not None:
        optimizer._write(name, layer, point, state)
    tail = linalg.tails(at.sigma)
    lost = float(tail[decision.rank] / tail[0]) if float(tail[0]) > 0 else 0.0
    return RankEvent(
        optimizer.steps, name, old_rank, decision.rank, point.rank - decision.rank, lost, decision.reason
    )


def optimizer_key(layer: AbstractLowRankLayer) -> Any:
    """Return the parameter under which the layer's state is kept."""
    return layer.A if layer.A is not None else layer.S
