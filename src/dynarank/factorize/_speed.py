"""Whether layers are expected to be faster through their factors than dense, with a batch of the size that is used."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from dynarank import cost
from dynarank.cost_model.calibration import costs_here
from dynarank.cost_model.costs import AbstractCosts, RuleOfThumb
from dynarank.cost_model.work import PURPOSES, Kind, Purpose, Work
from dynarank.errors import unknown_name
from dynarank.factorize._heads import call_with
from dynarank.factorize._sites import Site
from dynarank.factorize._targets import Target
from dynarank.measure import Trace, trace

KNOWN = ("linear", "conv2d")  # kinds of layers in the cost model


@dataclass(frozen=True)
class Speed:
    """What is expected of each layer.

    Args:
        purpose: What layers are to be faster in.
        rank_multiple: Factors are stored, and multiplied, in multiples of this many rows.
        seen: What each layer sees in one pass; those whose time is not known are missing.
        costs: What layers cost.
        source: Where that is from, in words.
    """

    purpose: Purpose
    rank_multiple: int
    seen: Mapping[nn.Module, Trace]
    costs: AbstractCosts
    source: str

    def most(self, module: nn.Module, target: Target) -> int | None:
        """Return the largest rank at which a layer is not slower than dense, 0 if none is, None if not known."""
        work = self._work(module, target, rank=1)
        if work is None:
            return None
        stored, largest = self.costs.break_even_rank(work, self.purpose), min(target.shape)
        return largest if stored == largest else stored // self.rank_multiple * self.rank_multiple

    def reason(self, module: nn.Module, target: Target, rank: int) -> str:
        """Return why a layer stays dense, or an empty string where it is faster low-rank or nothing is known."""
        most = self.most(module, target)
        if most is None or rank <= most:
            return ""
        seen, by = self.seen[module], "a rule of thumb" if isinstance(self.costs, RuleOfThumb) else "the calibration"
        rows = f"{seen.rows:,} row{'s' * (seen.rows != 1)}" + (f" in {seen.calls} calls" if seen.calls > 1 else "")
        slower = f"rank {rank} would not be faster in {self.purpose} with {rows}; at most {most} is"
        return f"{slower if most else f'no rank would be faster in {self.purpose} with {rows}'}, by {by}"

    def expected(self, module: nn.Module, target: Target, ranks: Sequence[int]) -> str:
        """Return what is expected of a layer that becomes low-rank, as a note; empty where there are no times."""
        work = self._work(module, target, ranks[0])
        if work is None:
            known = target.kind in KNOWN
            return f"speed unknown: {'it is not called with this batch' if known else f'no times of {target.kind}'}"
        seconds = self.costs.seconds(work, self.purpose)
        return "" if seconds is None else f"expected {seconds['dense'] / seconds['factored']:.3g} times as fast"

    def __str__(self) -> str:
        remedy = ". For times of this machine, run: dynarank calibrate" if isinstance(self.costs, RuleOfThumb) else ""
        return f"Speed in {self.purpose} is expected by {self.source}{remedy}"

    def _work(self, module: nn.Module, target: Target, rank: int) -> Work | None:
        if target.kind not in KNOWN or module not in self.seen:
            return None
        stored = min(cost.round_up(rank, self.rank_multiple), min(target.shape))
        return work_seen(self.seen[module], target.shape, stored, convolution=target.kind == "conv2d")


def check_asked(faster_in: object, example_inputs: object) -> None:
    """Refuse a purpose that does not exist, and one without a batch."""
    if faster_in not in (None, *PURPOSES):
        raise unknown_name("faster_in", faster_in, PURPOSES)
    if faster_in is not None and example_inputs is None:
        raise ValueError(
            f"faster_in={faster_in!r} needs example_inputs, a batch of the size that will be used: "
            "whether a low-rank layer is faster depends on the rows that it sees."
        )


def look(
    model: nn.Module, sites: Iterable[Site], example_inputs: Any, *, purpose: Purpose, rank_multiple: int
) -> Speed:
    """Return what is expected of the layers of a model, after one forward pass in eval mode without gradients."""
    layers = {site.name: site.module for site in sites if site.is_candidate and site.kind in KNOWN}
    traces = trace(model, layers, example_inputs, forward=call_with) if layers else {}
    costs, source = costs_here(next((layer.weight for layer in layers.values()), torch.empty(0)))
    seen = {layers[name]: found for name, found in traces.items() if found.calls}
    return Speed(purpose, rank_multiple, seen, costs, source)


def work_seen(seen: Trace, shape: tuple[int, int], rank: int, *, convolution: bool) -> Work:
    """Return the work of a linear layer, or of a 2-dimensional convolution, that has seen a batch."""
    kind: Kind = "linear"
    if convolution:
        kind = "conv2d channels last" if seen.channels_last else "conv2d"
    return Work(kind, shape, rank, seen.rows / seen.calls, seen.calls)
