"""The analysis of a module: the survey of its layers, and the spectrum of every weight."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from dynarank import cost
from dynarank.analysis._weight import (
    Tell,
    blank_entry,
    check_finite,
    outlooks,
    unreadable_tensor,
    with_spectrum,
)
from dynarank.analysis.findings import Analysis, LayerAnalysis
from dynarank.analysis.spectra import singular_values
from dynarank.compress._survey import MomentStore, Survey, survey
from dynarank.compress.budgets import Parameters
from dynarank.compress.compress import Compressor
from dynarank.compress.plan import Totals, plan_within
from dynarank.compress.report import CompressionReport
from dynarank.factorize import deployed_parameters
from dynarank.factorize.sites import ChosenSite, Selector, choose_sites, refuse_wrapped
from dynarank.layers._factored import AbstractFactoredLayer
from dynarank.layers.base import AbstractLowRankLayer
from dynarank.measure import Forward, call, stored_bytes

PROBE = torch.tensor([0.1], dtype=torch.float64)  # error of a layer at which its sensitivity is told


def analyze_model(
    model: nn.Module,
    *,
    calibration: Iterable[Any] | None,
    budgets: Sequence[float],
    timed: float | None,
    forward: Forward,
    target_modules: Selector,
    exclude_modules: Selector,
    include_head: bool,
    tell: Tell,
    **options: Any,
) -> Analysis:
    """Return the analysis of a module; arguments as in ``analyze``."""
    refuse_wrapped(model, "analyze")
    batches = None if calibration is None else list(calibration)
    if batches == []:
        raise ValueError("analyze: calibration holds no batch. Pass at least one, or None.")
    if timed and batches is None:
        raise ValueError("analyze: timed needs calibration data, which show what the layers are given.")
    selection: Any = dict(target_modules=target_modules, exclude_modules=exclude_modules, include_head=include_head)
    chosen = choose_sites(model, **selection)
    _check(model, chosen)
    if any(map(_can_shrink, chosen)):
        compressor = Compressor(model, calibration=batches, timed=timed, forward=forward, **selection, **options)
        surveys, plan = compressor.surveys, lambda budget: compressor.plan(budget).report
        measured = batches is not None and options.get("measured_sensitivity", True)
    else:
        surveys, plan = _without_options(model, chosen)
        measured = False
    layers = []
    for index, (one, known) in enumerate(zip(chosen, surveys, strict=True)):
        tell(index, len(chosen), known.name)
        layers += _entries(one, known, measured=measured)
    now, stored = plan(1.0), stored_bytes(model)
    found = outlooks(
        budgets,
        surveys,
        plan,
        parameters=now.parameters_before,
        stored=stored,
        itemsize=lambda index: next(chosen[index].site.module.parameters()).element_size(),
    )
    return Analysis(
        type(model).__name__,
        tuple(layers),
        found,
        now.parameters_before,
        stored,
        batches is not None,
        now.flops_before,
        now.seconds_before,
    )


def _check(model: nn.Module, chosen: Sequence[ChosenSite]) -> None:
    meta = [name for name, p in model.named_parameters() if p.is_meta]
    if meta:
        others = f" and {len(meta) - 1} more are" if len(meta) > 1 else " is"
        raise ValueError(
            f"analyze needs weights, but {meta[0]!r}{others} on the meta device. Load the trained weights first."
        )
    lazy = [name for name, p in model.named_parameters() if nn.parameter.is_lazy(p)]
    if lazy:
        raise ValueError(f"analyze needs weights, but {lazy[0]!r} is lazy: it has no shape yet. Run one batch first.")
    if not chosen:
        raise ValueError(f"analyze: {type(model).__name__} has no weight of two or more dimensions.")
    readable = False
    for name, p in model.named_parameters():
        if p.dim() >= 2 and not unreadable_tensor(p):
            readable = True
            check_finite(name, p)
    if not readable:
        one = chosen[0].site
        raise ValueError(f"analyze: no weight can be analysed. The first is {one.name} ({one.obstacle}).")


def _can_shrink(one: ChosenSite) -> bool:
    """Whether some form may be smaller than a layer, as far as its shape tells."""
    module = one.site.module
    if one.reason or isinstance(module, AbstractLowRankLayer):
        return not one.reason and module.rank > 1
    return cost.break_even_rank(len(module.weight), module.weight[0].numel()) >= 1


def _without_options(
    model: nn.Module, chosen: Sequence[ChosenSite]
) -> tuple[Sequence[Survey], Callable[[float], CompressionReport]]:
    """Return what is known of layers that can become no smaller, and the plan that keeps them."""
    store = MomentStore(model, [], None, forward=call, memory=0)
    surveys = survey(model, chosen, [], store, batches=None, divergence=None, rank_multiple=1, seconds=None)
    size = deployed_parameters(model)

    def plan(budget: float) -> CompressionReport:
        totals = Totals(size, None, None, size)
        allowed = float(budget * size if budget <= 1 else budget)
        return plan_within(model, surveys, Parameters(), allowed, totals, faster_only=False).report

    return surveys, plan


def _entries(one: ChosenSite, known: Survey, *, measured: bool) -> Iterator[LayerAnalysis]:
    """Yield the entry of each weight of a layer: the one of a known layer, else every matrix that it owns."""
    module = one.site.module
    if isinstance(module, AbstractFactoredLayer):
        weight: Any = module.weight
        weight = weight.detach().as_subclass(Tensor)
        entry = replace(_entry(known.name, known, weight), matrix_shape=module.matrix_shape, rank=module.rank)
        entry = replace(entry, parameters=known.parameters)
        rows = module.as_matrix(weight) if isinstance(module, AbstractLowRankLayer) else weight.flatten(1)
        yield _seen(entry, known, rows, measured=measured)
    elif one.site.twin is not None:
        yield _seen(_entry(known.name, known, module.weight), known, module.weight, measured=measured)
    else:
        own = {key: p for key, p in module._parameters.items() if p is not None and p.dim() >= 2}
        for key, weight in own.items():
            name = known.name if list(own) == ["weight"] else f"{known.name}.{key}".lstrip(".")
            yield _seen(_entry(name, known, weight), known, weight, measured=False)


def _entry(name: str, known: Survey, weight: Tensor) -> LayerAnalysis:
    return blank_entry(name, known, tuple(weight.shape), str(weight.dtype).removeprefix("torch."))


def _seen(entry: LayerAnalysis, known: Survey, weight: Tensor, *, measured: bool) -> LayerAnalysis:
    """Return an entry with the spectrum of its weight and what calibration told of its layer."""
    if reason := unreadable_tensor(weight):
        return replace(entry, reason=reason)
    entry = with_spectrum(entry, known, singular_values(weight).cpu())
    if measured and known.menu:
        entry = replace(entry, sensitivity=float(known.damage.of(PROBE)) / float(PROBE))
    if known.trace is not None:
        entry = replace(entry, rows=known.trace.rows, flops=2 * known.multiplications)
    return replace(entry, seconds=known.times.present if known.times else None)
