"""A rank change as one transaction: plan, check, cut, grow, carry the state along, record."""

import zlib
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from dynarank import factors, linalg
from dynarank.events import RankEvent
from dynarank.factors import FactorPair, LowRankFactors
from dynarank.layers.base import AbstractLowRankLayer
from dynarank.ranks.base import Decision, LayerSpectrum

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
    point = optimizer.point_of(name, layer)
    if isinstance(point, LowRankFactors):
        return factors.diagonalise(point)
    in_gauge = optimizer.integrator.keeps_gauge and optimizer.trusts(name, layer)
    return factors.read_balanced(point) if in_gauge else factors.read_pair(point)


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
) -> tuple[FactorPair, dict[str, Tensor] | None]:
    """Return the new point and the state that belongs to it."""
    old, kept = optimizer.point_of(name, layer), factors.truncate(at, rank=rank)
    state = optimizer.state_of(layer) if optimizer.trusts(name, layer) else None
    if grow:
        ways = optimizer.integrator.directions(state, old) if state else None
        left, right = ways or _random_ways(optimizer, name, kept, grow)
        left, right = linalg.complement(kept.U, left, grow), linalg.complement(kept.V, right, grow)
        count = min(left.shape[-1], right.shape[-1])
        kept = factors.augment(kept, left=left[:, :count], right=right[:, :count])
    new = factors.to_pair(kept)
    return new, None if state is None else optimizer.integrator.transport(state, old, new)


def _random_ways(optimizer: "LowRankOptimizer", name: str, at: LowRankFactors, count: int) -> tuple[Tensor, Tensor]:
    """Directions drawn from the step and the layer's name alone: the same on every process and after a resume."""
    generator = torch.Generator().manual_seed(zlib.crc32(f"{name}@{optimizer.steps}".encode()))
    return (
        linalg.random_orthonormal((at.shape[0], min(count, at.shape[0])), generator=generator, like=at.U),
        linalg.random_orthonormal((at.shape[1], min(count, at.shape[1])), generator=generator, like=at.V),
    )


def _apply(
    optimizer: "LowRankOptimizer",
    name: str,
    layer: AbstractLowRankLayer,
    at: LowRankFactors,
    decision: Decision,
    point: FactorPair,
    state: dict[str, Tensor] | None,
    *,
    resize: bool,
) -> RankEvent:
    optimizer.write(name, layer, point, state, resize=resize)
    tail = linalg.tails(at.sigma)
    lost = float(tail[decision.rank] / tail[0]) if float(tail[0]) > 0 else 0.0
    grown = point.rank - decision.rank
    return RankEvent(optimizer.steps, name, at.rank, decision.rank, grown, lost, decision.reason)
