"""A plan of compression: what every layer is to become within a budget. Nothing is changed here."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from dynarank.compress._allocation import Menu, allocate
from dynarank.compress._survey import MomentStore, Survey, check_current
from dynarank.compress.budgets import AbstractMeasure
from dynarank.compress.forms.base import AbstractForm, Options
from dynarank.compress.report import CompressedLayer, CompressionReport
from dynarank.factorize.sites import carry_attributes, put_in_place
from dynarank.layers.base import AbstractLowRankLayer

KEPT = "worth more as it is, at this budget"
SLOWER = "no smaller size is faster"


@dataclass(frozen=True)
class Choice:
    """The option that a layer takes.

    Args:
        form: Its form.
        options: What the form offers.
        index: Which of them.
    """

    form: AbstractForm
    options: Options
    index: int


@dataclass(frozen=True)
class Totals:
    """What the model costs before anything is changed.

    Args:
        parameters: Numbers in the deployed state dict.
        flops: Operations of one forward pass, or None without calibration.
        seconds: Measured seconds of one forward pass, or None where layers were not timed.
        cost: In the measure of the budget.
    """

    parameters: int
    flops: int | None
    seconds: float | None
    cost: float


@dataclass(frozen=True)
class Plan:
    """What is to become of every layer, and what that comes to. ``print(plan)`` shows the table.

    Args:
        surveys: What is known of the layers.
        choices: The option of each, or None where it stays as it is.
        report: What the plan comes to.
    """

    surveys: tuple[Survey, ...]
    choices: tuple[Choice | None, ...]
    report: CompressionReport

    def __str__(self) -> str:
        return str(self.report)

    @torch.inference_mode(False)  # parameters that were made in inference mode could not be trained
    @torch.no_grad()
    def apply_(self, model: nn.Module, store: MomentStore) -> None:
        """Replace the layers of ``model`` one after the other: no more than one is in memory twice.

        Raises:
            RuntimeError: The model was changed since it was looked at.
        """
        check_current(model, self.surveys)
        # From the last to the first: the moments of a layer are those before the layers in front of it are replaced.
        for known, choice in reversed(list(zip(self.surveys, self.choices, strict=True))):
            if choice is not None:
                layer = model.get_submodule(known.name)
                new = choice.form.build(layer, store.of(known.name), choice.options.ranks[choice.index])
                _carry(layer, new)
                put_in_place(model, {layer: new}, verb="compress_")


def _carry(layer: nn.Module, new: Any) -> None:
    """Copy what users have set on a layer to its replacement."""
    twin = new if isinstance(new, AbstractLowRankLayer) else new[-1]
    carry_attributes(layer, new, fresh=twin if isinstance(layer, AbstractLowRankLayer) else twin.dense_twin("meta"))


def plan_within(
    model: nn.Module,
    surveys: Sequence[Survey],
    measure: AbstractMeasure,
    allowed: float,
    totals: Totals,
    *,
    faster_only: bool,
) -> Plan:
    """Return the plan with the smallest expected damage whose cost is at most ``allowed``.

    Args:
        model: The model.
        surveys: What is known of its layers.
        measure: What the budget counts.
        allowed: How much of it there may be.
        totals: What the model costs now.
        faster_only: Whether layers that would get slower stay as they are.

    Raises:
        ValueError: The budget cannot be met.
    """
    menus, offers = [], []
    for known in surveys:
        menu, offered = _menu(model, known, measure, faster_only=faster_only)
        menus.append(menu)
        offers.append(offered)
    present = sum(float(menu.costs[-1]) for menu in menus)
    rest = totals.cost - present
    try:
        chosen = allocate(menus, present - (totals.cost - allowed))
    except ValueError:
        least = rest + sum(float(menu.costs.min()) for menu in menus)
        raise ValueError(_too_tight(measure, allowed, least, totals.cost, surveys, offers)) from None
    choices = tuple(offered[i] if i < len(offered) else None for offered, i in zip(offers, chosen, strict=True))
    after = rest + sum(float(menu.costs[i]) for menu, i in zip(menus, chosen, strict=True))
    return Plan(tuple(surveys), choices, _report(surveys, offers, choices, measure, allowed, totals, after))


def _menu(model: nn.Module, known: Survey, measure: AbstractMeasure, *, faster_only: bool) -> tuple[Menu, list[Choice]]:
    """Return what the options of a layer do and cost, the layer as it is last, and the options themselves."""
    layer: Any = model.get_submodule(known.name)
    present = measure.present(layer, known)
    offers: list[Choice] = []
    errors, costs = [], []
    for form, options in known.menu:
        keep = measure.of(layer, options, known.times) < present
        if faster_only and known.times is not None:
            keep &= known.times.of(options) < known.times.present
        indices = keep.nonzero().flatten().tolist()
        offers += [Choice(form, options, index) for index in indices]
        errors.append(known.damage.of(options.errors[indices]))
        costs.append(measure.of(layer, options, known.times)[indices])
    zero = torch.zeros(1, dtype=torch.float64)
    return Menu(torch.cat([*errors, zero]), torch.cat([*costs, zero + present])), offers


def _too_tight(
    measure: AbstractMeasure,
    allowed: float,
    least: float,
    total: float,
    surveys: Sequence[Survey],
    offers: Sequence[list[Choice]],
) -> str:
    fixed = [
        f"{known.name} ({known.reason or SLOWER})"
        for known, offered in zip(surveys, offers, strict=True)
        if not offered
    ]
    why = f" These stay as they are: {', '.join(fixed[:6])}{' and others' if len(fixed) > 6 else ''}." if fixed else ""
    return (
        f"compress_: a budget of {measure.text(allowed)} cannot be met: with every layer at its smallest the model "
        f"still takes {measure.text(least)}, {least / total:.1%} of what it takes now. The model is unchanged.{why}"
    )


def _report(
    surveys: Sequence[Survey],
    offers: Sequence[list[Choice]],
    choices: Sequence[Choice | None],
    measure: AbstractMeasure,
    allowed: float,
    totals: Totals,
    after: float,
) -> CompressionReport:
    layers = tuple(_layer(*row) for row in zip(surveys, offers, choices, strict=True))
    pairs = [(known, choice) for known, choice in zip(surveys, choices, strict=True) if choice is not None]
    saved = sum(known.parameters - _int(choice.options.parameters, choice) for known, choice in pairs)
    flops = seconds = None
    if totals.flops is not None:
        flops = totals.flops - sum(
            2 * (known.multiplications - _int(choice.options.multiplications, choice)) for known, choice in pairs
        )
    if totals.seconds is not None:
        seconds = totals.seconds - sum(
            known.times.present - float(known.times.of(choice.options)[choice.index])
            for known, choice in pairs
            if known.times is not None
        )
    return CompressionReport(
        layers=layers,
        measure=type(measure).__name__.lower(),
        budget=allowed,
        cost_before=totals.cost,
        cost_after=after,
        parameters_before=totals.parameters,
        parameters_after=totals.parameters - saved,
        flops_before=totals.flops,
        flops_after=flops,
        seconds_before=totals.seconds,
        seconds_after=seconds,
    )


def _layer(known: Survey, offered: list[Choice], choice: Choice | None) -> CompressedLayer:
    before = known.times.present if known.times else None
    if choice is None:
        reason = known.reason or (KEPT if offered else SLOWER)
        size = known.parameters
        return CompressedLayer(
            known.name, known.kind, known.shape, "", (), size, size, 0.0, 0.0, reason, before, before
        )
    options, index = choice.options, choice.index
    return CompressedLayer(
        known.name,
        known.kind,
        known.shape,
        options.form,
        options.ranks[index],
        known.parameters,
        _int(options.parameters, choice),
        float(options.errors[index]),
        float(known.damage.of(options.errors[index, None])),
        seconds_before=before,
        seconds_after=float(known.times.of(options)[index]) if known.times else None,
    )


def _int(values: Tensor, choice: Choice) -> int:
    return int(values[choice.index])
