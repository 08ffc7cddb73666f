"""Which layers gain time from two factors: a training step of each, dense against factored, on what it really sees."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from dynarank.dense_start._candidates import Candidate
from dynarank.measure import Forward, interleaved, run, unfused
from dynarank.measure._forward import evaluating, watching

Speedup = Callable[[nn.Module, nn.Module, Sequence[Tensor]], float]

PART = 0.25  # of full rank at which layers are tried
SECONDS = 0.3  # about how long each is timed


@dataclass
class Seen:
    """What a layer saw in one forward pass: its inputs, and the type to which autocast took them, if it did."""

    inputs: list[Tensor] = field(default_factory=list)
    autocast: torch.dtype | None = None


def slow_layers(
    model: nn.Module,
    candidates: Mapping[str, Candidate],
    *,
    least: float,
    batch: Any,
    forward: Forward,
    speedup: Speedup,
) -> dict[str, str]:
    """Return the layers whose training step two factors of a quarter of full rank do not make fast enough, and why.

    Args:
        model: The dense model; gradients, training flags and generators are left as they are.
        candidates: The layers in question.
        least: Least speed-up.
        batch: What ``forward`` takes.
        forward: How a batch enters the model.
        speedup: What is asked for each layer, with autocast as in the forward pass.
    """
    layers = {name: model.get_submodule(name) for name in candidates}
    reasons = {}
    for name, seen in _seen(model, layers, batch, forward).items():
        rank = max(1, int(PART * candidates[name].full))
        if not seen.inputs:
            reasons[name] = "the batch does not call it, so what it would gain is not known"
            continue
        with _as_seen(seen):
            gain = speedup(layers[name], candidates[name].sample(layers[name], rank=rank), seen.inputs)
        if not gain >= least:
            reasons[name] = f"{gain:.2f} times as fast at rank {rank}, below least_speedup = {least:g}"
    return reasons


def measured_speedup(dense: nn.Module, low_rank: nn.Module, inputs: Sequence[Tensor]) -> float:
    """Return how many times as fast forward and backward pass of the second layer are, timed in turn.

    Example:
        >>> wide, narrow = nn.Linear(512, 512), nn.Linear(512, 8)
        >>> measured_speedup(wide, narrow, [torch.randn(64, 512)]) > 1
        True
    """
    calls = {name: partial(_train, layer, inputs) for name, layer in (("dense", dense), ("low-rank", low_rank))}
    times = interleaved(calls, seconds=SECONDS)
    return times["dense"].median / times["low-rank"].median


@torch.enable_grad()
def _train(layer: nn.Module, inputs: Sequence[Tensor]) -> None:
    """Take gradients with respect to parameters and inputs; none is stored, and hooks of the layer are left out."""
    trained = [p for p in layer.parameters() if p.requires_grad]
    for x in inputs:
        y = layer.forward(x)
        torch.autograd.grad(y, [*trained, *([x] if x.requires_grad else [])], torch.ones_like(y))


def _seen(model: nn.Module, layers: Mapping[str, nn.Module], batch: Any, forward: Forward) -> dict[str, Seen]:
    """Return what each layer sees while the model computes one batch in eval mode."""
    found = {name: Seen() for name in layers}

    def note(name: str, layer: nn.Module, x: Tensor, output: Any) -> None:
        found[name].inputs.append(x.detach().clone().requires_grad_(x.requires_grad))
        kind = x.device.type
        found[name].autocast = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else None

    # With gradients, so that the input of the first layer is known to need none.
    with evaluating(model), torch.enable_grad(), unfused(), watching(layers, note):
        run(forward, model, batch, 0)
    return found


@contextmanager
def _as_seen(seen: Seen) -> Iterator[None]:
    """Compute in the precision in which the layer was called; what is cast is cast anew in every call."""
    kind = seen.inputs[0].device.type
    on = seen.autocast is not None
    with torch.autocast(kind, seen.autocast, enabled=on, cache_enabled=False):
        yield
