"""``compress_``: a trained model made smaller or faster, in place, within a budget shared out over its layers."""

import math
from collections.abc import Iterable, Mapping, Sequence
from functools import cached_property, partial
from numbers import Real
from typing import Any

import torch
from torch import Tensor, nn

from dynarank._discovery import discover, resolve
from dynarank.compress._survey import MomentStore, Survey, check_current, probes_of, survey
from dynarank.compress.budgets import AbstractMeasure, choose_measure
from dynarank.compress.forms.base import AbstractForm
from dynarank.compress.plan import Plan, Totals, plan_within
from dynarank.compress.report import CompressionReport
from dynarank.compress.sensitivity import Divergence, relative_error
from dynarank.compress.statistics import rehearse, renew_statistics_, renew_where_better_, tracking_layers
from dynarank.errors import unknown_name
from dynarank.factorize import deployed_parameters
from dynarank.factorize.sites import ChosenSite, Selector, choose_sites, refuse_wrapped
from dynarank.measure import Forward, call, copied, evaluating, flops, latency

METHODS = ("activation_aware", "svd")
FORMS = "dynarank.compress.forms"


class Compressor:
    """Looks at a trained model once, and then plans its compression to any number of budgets.

    The model is left as it is; ``compress_`` and ``analyze`` are the short ways to use this.

    Args:
        model: Any module with layers inside.
        calibration: Batches of representative data: a ``DataLoader`` or a list. Tensors, mappings of arguments, or
            pairs whose first part is the input. Without it the weights alone decide.
        method: ``"activation_aware"`` keeps what matters to the outputs on the calibration data; ``"svd"`` what is
            large in the weights. By default the first where there is calibration data.
        forms: Names of the forms to consider; all by default.
        target_modules: Layers to consider, as in ``factorize_``; all by default.
        exclude_modules: Layers to leave alone, as in ``factorize_``.
        include_head: Whether the classifier head is considered too.
        rank_multiple: Ranks are multiples of it, where a layer has room for two of them; odd ranks are slow.
        measured_sensitivity: Whether it is measured how much each layer's truncation changes the model's outputs.
            Otherwise the relative errors of all layers count the same. Needs calibration.
        divergence: What change of the outputs counts, given those before and now: by default the relative squared
            error; ``kl_divergence`` for logits.
        timed: Seconds to spend on timing each replacement of each layer; None for no timing.
        forward: How a batch goes through the model; by default ``measure.call``.
        memory: Bytes that moments of inputs may take at a time.

    Raises:
        ValueError: A name is unknown, the model is on the meta device, a weight is not finite, nothing can be
            compressed, or calibration data do not fit.
        RuntimeError: The model is already wrapped for distributed training.
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        calibration: Iterable[Any] | None = None,
        method: str | None = None,
        forms: Sequence[str] | None = None,
        target_modules: Selector = None,
        exclude_modules: Selector = None,
        include_head: bool = False,
        rank_multiple: int = 1,
        measured_sensitivity: bool = True,
        divergence: Divergence = relative_error,
        timed: float | None = None,
        forward: Forward = call,
        memory: int = 4 * 2**30,
    ) -> None:
        refuse_wrapped(model, "compress_")
        _check_model(model)
        if rank_multiple < 1:
            raise ValueError(f"rank_multiple must be at least 1, got {rank_multiple}.")
        self.model, self.forward, self.timed = model, forward, timed
        self.divergence, self.measured = divergence, measured_sensitivity
        self.batches = _checked_batches(calibration)
        self.method = _choose_method(method, self.batches)
        if timed and self.batches is None:
            raise ValueError("compress_: timing layers needs calibration data, which shows what they are given.")
        chosen = choose_sites(
            model, target_modules=target_modules, exclude_modules=exclude_modules, include_head=include_head
        )
        _check_layers(chosen)
        names = [one.site.name for one in chosen if not one.reason]
        moments = self.batches if self.method == "activation_aware" else None
        self.store = MomentStore(model, names, moments, forward=forward, memory=memory)
        self.surveys: tuple[Survey, ...] = tuple(
            survey(
                model,
                chosen,
                _choose_forms(forms),
                self.store,
                batches=self.batches,
                divergence=divergence if measured_sensitivity else None,
                rank_multiple=rank_multiple,
                seconds=timed,
            )
        )
        if not any(known.menu for known in self.surveys):
            raise ValueError(f"compress_ can replace no layer. {_reasons(self.surveys)}")

    def plan(self, budget: float, *, measure: str | AbstractMeasure = "parameters", faster_only: bool = False) -> Plan:
        """Return the plan of least damage within a budget; the model is left as it is.

        Args:
            budget: How much of the measure there may be: up to 1 as a fraction of what the model takes now, above 1 in
                the measure's own unit (numbers, bytes, operations). Latency is always a fraction.
            measure: ``"parameters"``, ``"bytes"``, ``"flops"`` or ``"latency"``.
            faster_only: Whether layers that would get slower stay as they are. Needs ``timed``.

        Raises:
            ValueError: The budget is no positive number, or cannot be met; the message says how close it came.
            RuntimeError: The model was changed since it was looked at.
        """
        measure = choose_measure(measure) if isinstance(measure, str) else measure
        _check_budget(budget, measure)
        check_current(self.model, self.surveys)
        if measure.needs_batch and self.batches is None:
            raise ValueError(f"a budget of {_name(measure)} needs calibration data, which shows what layers are given.")
        if (measure.needs_times or faster_only) and not self.timed:
            raise ValueError(f"{_name(measure) if measure.needs_times else 'faster_only'} needs timed layers.")
        totals = self._totals(measure)
        allowed = float(budget * totals.cost if budget <= 1 else budget)
        return plan_within(self.model, self.surveys, measure, allowed, totals, faster_only=faster_only)

    @torch.no_grad()
    def apply_(
        self, plan: Plan, *, model: nn.Module | None = None, renew_statistics: bool | None = None
    ) -> CompressionReport:
        """Carry out a plan in place and return its report.

        Args:
            plan: A plan that this object made.
            model: A copy of the model to change instead, so that several plans can be tried.
            renew_statistics: Whether batch normalisation is fitted to the compressed model on the calibration data;
                None where that brings the outputs nearer to those before, if sensitivities are measured.

        Raises:
            ValueError: Statistics cannot be had from the calibration data. The model is unchanged.
            RuntimeError: The model was changed since it was looked at.
        """
        model = self.model if model is None else model
        batches = self.batches or []
        if renew_statistics is None and not self.measured:
            renew_statistics = bool(batches)
        if renew_statistics and not batches:
            raise ValueError("compress_: renew_statistics needs calibration data. Pass them, or leave it out.")
        if batches and renew_statistics is not False:
            rehearse(model, batches, forward=self.forward)
        watched = batches if renew_statistics is None and tracking_layers(model) else []
        with evaluating(model):
            before = probes_of(model, watched, self.forward)
        plan.apply_(model, self.store)
        if renew_statistics is None and batches:
            distance = partial(self._distance, model, before)
            renew_where_better_(model, batches, distance, forward=self.forward)
        elif renew_statistics:
            renew_statistics_(model, batches, forward=self.forward)
        return plan.report

    def _distance(self, model: nn.Module, before: list[tuple[Any, Any]]) -> float:
        """Return how far the outputs are from those before, on the batches they were taken from."""
        with evaluating(model):
            return sum(float(self.divergence(outputs, self.forward(model, copied(batch)))) for batch, outputs in before)

    def _totals(self, measure: AbstractMeasure) -> Totals:
        batch = self.batches[0] if self.batches else None
        operations = flops(self.model, batch, forward=self.forward) if self.batches else None
        seconds = self._seconds if self.timed else None
        cost = seconds if measure.needs_times else measure.total(self.model, batch, self.forward)
        assert cost is not None
        return Totals(deployed_parameters(self.model), operations, seconds, cost)

    @cached_property
    def _seconds(self) -> float:
        assert self.batches is not None
        return latency({"model": self.model}, self.batches[0], forward=self.forward)["model"].median


def compress_(
    model: nn.Module,
    budget: float,
    *,
    measure: str = "parameters",
    calibration: Iterable[Any] | None = None,
    faster_only: bool = False,
    renew_statistics: bool | None = None,
    timed: float | None = None,
    **options: Any,
) -> CompressionReport:
    """Compress a trained model in place: every layer gets the form and rank that do least damage within the budget.

    Layers become low-rank layers, which go on training with ``LowRankOptimizer`` or any optimizer of torch, merge and
    export. With calibration data truncation minimises the error of the layers' outputs, and it is measured how much
    each layer matters to the outputs of the model. Layers are replaced one after the other, never more than one twice
    in memory. Nothing is random.

    Args:
        model: Any trained module with layers inside.
        budget: How much of the measure there may be: up to 1 as a fraction of what the model takes now, above 1 in
            the measure's own unit (numbers, bytes, operations). Latency is always a fraction.
        measure: ``"parameters"``, ``"bytes"``, ``"flops"`` or ``"latency"``, the last measured on this machine on the
            first calibration batch.
        calibration: Batches of representative data: a ``DataLoader`` or a list of tensors, of mappings of arguments,
            or of pairs whose first part is the input.
        faster_only: Whether layers that would get slower stay as they are.
        renew_statistics: Whether batch normalisation is fitted to the compressed model on the calibration data; None
            where that brings the outputs nearer to those before, if sensitivities are measured.
        timed: Seconds to spend on timing each replacement of each layer; by default 0.05 where the measure or
            ``faster_only`` needs it, else none.
        options: Further options of `Compressor`: ``method``, ``forms``, ``target_modules``, ``exclude_modules``,
            ``include_head``, ``rank_multiple``, ``measured_sensitivity``, ``divergence``, ``forward``, ``memory``.

    Returns:
        What became of every layer, or why it stays as it is; print it.

    Raises:
        ValueError: The budget cannot be met, a name is unknown, the model is on the meta device, a weight or the
            calibration data are not finite, or they do not fit the model. The model is unchanged.
        TypeError: ``calibration`` is a single batch.
        RuntimeError: The model is already wrapped for distributed training.

    Example:
        >>> _ = torch.manual_seed(0)
        >>> model = nn.Sequential(nn.Linear(40, 30), nn.ReLU(), nn.Linear(30, 20), nn.ReLU(), nn.Linear(20, 5))
        >>> report = compress_(model, 0.5, calibration=[torch.randn(64, 40)])
        >>> report.parameters_before, report.parameters_after <= 977
        (1955, True)

    Reference:
        Wang et al., "SVD-LLM: truncation-aware singular value decomposition for large language model compression",
        ICLR 2025, https://arxiv.org/abs/2403.07378; Chen et al., "DRONE: data-aware low-rank compression for large
        NLP models", NeurIPS 2021. We need no inverse of the moments, and share ranks out by measured sensitivity.
    """
    counted = choose_measure(measure)
    _check_budget(budget, counted)  # before the model is looked at, which may take long
    if timed is None and (faster_only or counted.needs_times):
        timed = 0.05
    compressor = Compressor(model, calibration=calibration, timed=timed, **options)
    plan = compressor.plan(budget, measure=counted, faster_only=faster_only)
    return compressor.apply_(plan, renew_statistics=renew_statistics)


# --- checks ------------------------------------------------------------------------------------------------------


def _check_model(model: nn.Module) -> None:
    meta = [name for name, p in model.named_parameters() if p.is_meta]
    if meta:
        raise ValueError(
            f"compress_ needs weights, but {meta[0]!r} and {len(meta) - 1} more parameters are on the meta device. "
            "Load the trained weights first."
        )


def _check_budget(budget: float, measure: AbstractMeasure) -> None:
    number = isinstance(budget, Real) and not isinstance(budget, bool)
    if not (number and math.isfinite(budget) and budget > 0):
        raise ValueError(f"budget must be a fraction in (0, 1] or a number above 1, got {budget!r}.")
    if measure.needs_times and budget > 1:
        raise ValueError(f"a budget of {_name(measure)} must be a fraction in (0, 1], got {budget!r}.")


def _check_layers(chosen: Sequence[ChosenSite]) -> None:
    """Refuse weights that are not finite; a plan without any layer is refused later, with all reasons."""
    for one in chosen:
        if not one.reason and not all(bool(p.isfinite().all()) for p in one.site.module.parameters(recurse=False)):
            raise ValueError(f"compress_: {one.site.name}: its weights hold NaN or infinity. The model is unchanged.")


def _checked_batches(calibration: Iterable[Any] | None) -> list[Any] | None:
    if calibration is None:
        return None
    if isinstance(calibration, Tensor | Mapping | str) or not isinstance(calibration, Iterable):
        raise TypeError(
            f"compress_: calibration must be a list of batches or a DataLoader, got {type(calibration).__name__}. "
            "Pass [batch] for a single one."
        )
    batches = list(calibration)
    if not batches:
        raise ValueError("compress_: calibration holds no batch. Pass at least one, or None.")
    return batches


def _choose_method(method: str | None, batches: list[Any] | None) -> str:
    if method is None:
        return "activation_aware" if batches else "svd"
    if method not in METHODS:
        raise unknown_name("method", method, METHODS)
    if method == "activation_aware" and batches is None:
        raise ValueError("compress_: method 'activation_aware' needs calibration data. Pass them, or method='svd'.")
    return method


def _choose_forms(names: Sequence[str] | None) -> list[AbstractForm]:
    names = sorted(discover(FORMS, AbstractForm)) if names is None else [names] if isinstance(names, str) else names
    if not names:
        raise ValueError("compress_: forms is empty. Leave it out for all.")
    return [resolve("form", FORMS, AbstractForm, name) for name in names]  # type: ignore[misc]


def _reasons(surveys: Sequence[Survey]) -> str:
    told = [f"{known.name} ({known.reason})" for known in surveys]
    if not told:
        return "It has no layer with a weight matrix."
    return f"Of {len(told)} layers: {', '.join(told[:8])}{' and others' if len(told) > 8 else ''}."


def _name(measure: AbstractMeasure) -> str:
    return type(measure).__name__.lower()
