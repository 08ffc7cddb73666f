"""``calibrate``: measure single layers on this machine, and fit how long any layer takes."""

from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from statistics import fmean, median
from time import perf_counter
from typing import Any

import torch

from dynarank.calibration._fit import fit_times
from dynarank.calibration._samples import Sample, Setting, measure, settings
from dynarank.cost_model.calibration import Calibration
from dynarank.cost_model.costs import AbstractCosts, Check, MeasuredCosts, RuleOfThumb, terms
from dynarank.cost_model.machine import this_machine
from dynarank.cost_model.work import KINDS, OPERATORS, PURPOSES, Kind, Purpose

PASSES = 8  # one pass over all layers takes this part of the time; half of the time is for the rounds that count
LEAST = {False: 8, True: 4}  # settings of each kind that are measured in any case, held out or not


def calibrate(
    *, device: torch.device | str = "cpu", dtype: torch.dtype = torch.float32, seconds: float = 40.0
) -> Calibration:
    """Return how long layers take here: linear ones and 2-dimensional convolutions, dense and low-rank.

    Small layers are timed first, larger ones as far as the time goes, all of them in turn, with the threads that torch
    has now. Some shapes are left out of the fit and tell how good it is. Anything else that runs on the machine
    disturbs; least so with one thread, where the time of the processor counts instead of that on the wall.

    Args:
        device: Where to measure.
        dtype: Type of weights and inputs.
        seconds: About how long to take. The least that is measured takes a few seconds.

    Raises:
        ValueError: ``seconds`` is not positive, or the device is not there.

    Example:
        >>> calibration = calibrate(seconds=20)  # doctest: +SKIP
        >>> calibration.save()  # doctest: +SKIP
    """
    if not seconds > 0:
        raise ValueError(f"seconds must be above 0, got {seconds}.")
    device = _present(device)
    found = sorted((setting for kind in KINDS for setting in settings(kind)), key=lambda s: s.multiplications)
    samples = measure(_while_time(found, seconds / PASSES), device=device, dtype=dtype, seconds=seconds / 2)
    return Calibration(this_machine(device, dtype), *fit(samples))


def fit(samples: Iterable[Sample]) -> tuple[MeasuredCosts, tuple[Check, ...]]:
    """Return the times of every operator, fitted to all but the held-out samples, and what these say of the fit."""
    samples = list(samples)
    operators: dict[Purpose, dict[str, Any]] = {purpose: {} for purpose in PURPOSES}
    for purpose in PURPOSES:
        for kind in KINDS:
            seen = [s for s in samples if (s.purpose, s.work.kind, s.held_out) == (purpose, kind, False)]
            operators[purpose] |= _fit_kind(kind, seen)
    costs = MeasuredCosts(operators)
    held_out = [s for s in samples if s.held_out]
    checks = (_check(kind, purpose, costs, held_out) for kind in KINDS for purpose in PURPOSES)
    return costs, tuple(check for check in checks if check is not None)


def _fit_kind(kind: Kind, samples: Sequence[Sample]) -> dict[str, tuple[float, ...]]:
    names = [name for name in OPERATORS if name.removesuffix(" up") == kind]
    counts = torch.zeros(len(samples), len(names), 5, dtype=torch.float64)
    for row, sample in zip(counts, samples, strict=True):
        for stage in sample.work.stages(sample.form):
            row[names.index(stage.operator)] += torch.tensor(terms(stage), dtype=torch.float64)
    seconds = torch.tensor([sample.seconds for sample in samples], dtype=torch.float64)
    times = fit_times(counts.flatten(1), seconds).unflatten(0, (-1, 5))
    return {name: tuple(values) for name, values in zip(names, times.tolist(), strict=True)}


def _check(kind: Kind, purpose: Purpose, costs: MeasuredCosts, held_out: Sequence[Sample]) -> Check | None:
    here = [s for s in held_out if (s.purpose, s.work.kind) == (purpose, kind)]
    dense = {(s.work.shape, s.work.rows): s.seconds for s in here if s.form == "dense"}
    ratios = [(s.work, s.seconds / dense[s.work.shape, s.work.rows]) for s in here if s.form == "factored"]
    if not ratios:
        return None
    errors = []
    for work, ratio in ratios:
        expected = costs.of(work, purpose)
        errors.append(abs(expected["factored"] / expected["dense"] / ratio - 1))

    def loss(by: AbstractCosts) -> float:
        return fmean(_taken(by, work, purpose, ratio) / min(1, ratio) - 1 for work, ratio in ratios)

    return Check(kind, purpose, len(ratios), median(errors), max(errors), loss(costs), loss(RuleOfThumb()))


def _taken(by: AbstractCosts, work: Any, purpose: Purpose, ratio: float) -> float:
    """Return the time of what is chosen, dense being 1."""
    expected = by.of(work, purpose)
    return ratio if expected["factored"] <= expected["dense"] else 1.0


def _while_time(found: Iterable[Setting], seconds: float) -> Iterator[Setting]:
    """Yield settings until their user has taken so much time, and the first ones of every sort in any case."""
    started, taken = perf_counter(), Counter()
    for setting in found:
        sort = setting.work.kind, setting.held_out
        if taken[sort] < LEAST[setting.held_out] or perf_counter() - started < seconds:
            taken[sort] += 1
            yield setting


def _present(device: torch.device | str) -> torch.device:
    try:
        return torch.empty(1, device=device).device
    except (RuntimeError, AssertionError) as fault:  # what torch raises where it was built without the device
        why = str(fault).splitlines()[0]
        raise ValueError(
            f"device must be one that torch can use here, such as cpu, got {str(device)!r}: {why}"
        ) from None
