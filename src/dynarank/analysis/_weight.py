"""What model and file have in common: the entry of one weight, and the outlook at one budget."""

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from dynarank import cost
from dynarank.analysis.findings import ErrorCurve, LayerAnalysis, Outlook
from dynarank.analysis.spectra import describe, thinned
from dynarank.compress._survey import Survey
from dynarank.compress.report import CompressionReport

DTYPES = ("float16", "bfloat16", "float32", "float64")

Tell = Callable[[int, int, str], None]  # how many weights are done, how many there are, which one is next


def silent(done: int, total: int, name: str) -> None:
    """Tell nobody how far the analysis is."""


def check_budgets(budgets: Iterable[float]) -> tuple[float, ...]:
    """Return the budgets if they are positive numbers.

    Raises:
        ValueError: One is not.
    """
    budgets = tuple(budgets)
    for budget in budgets:
        if isinstance(budget, bool) or not (isinstance(budget, int | float) and math.isfinite(budget) and budget > 0):
            raise ValueError(f"budgets must be fractions in (0, 1] or numbers above 1, got {budget!r}.")
    return budgets


def check_finite(name: str, weight: Tensor) -> None:
    """Refuse a weight with NaN or infinity.

    Raises:
        ValueError: It has one.
    """
    if not bool(weight.isfinite().all()):
        raise ValueError(f"analyze: {name} holds NaN or infinity. Load weights that are whole.")


def blank_entry(name: str, known: Survey, shape: tuple[int, ...], dtype: str) -> LayerAnalysis:
    """Return the entry of a weight without its spectrum."""
    matrix = (shape[0], math.prod(shape[1:]))
    return LayerAnalysis(name, known.kind, shape, matrix, math.prod(shape), dtype, reason=known.reason)


def with_spectrum(entry: LayerAnalysis, known: Survey, sigma: Tensor) -> LayerAnalysis:
    """Return the entry of a weight with what its singular values and the survey of its layer tell."""
    spectrum, pays = describe(sigma, entry.matrix_shape), cost.break_even_rank(*entry.matrix_shape)
    return replace(entry, spectrum=spectrum, break_even=pays, curves=tuple(curves_of(known)))


def curves_of(known: Survey) -> Iterator[ErrorCurve]:
    """Yield error against size for each form that a layer could take."""
    for _, options in known.menu:
        keep = thinned(len(options.ranks))
        seconds = known.times.of(options)[keep].tolist() if known.times is not None else ()
        yield ErrorCurve(
            options.form,
            tuple(options.ranks[index] for index in keep),
            tuple(options.parameters[keep].tolist()),
            tuple(options.errors[keep].tolist()),
            tuple(known.damage.of(options.errors[keep]).tolist()),
            tuple(seconds),
        )


def outlooks(
    budgets: Sequence[float],
    surveys: Sequence[Survey],
    plan: Callable[[float], CompressionReport],
    *,
    parameters: int,
    stored: int,
    itemsize: Callable[[int], int],
) -> tuple[Outlook, ...]:
    """Return what the model comes to at each budget; one that cannot be met says so.

    Args:
        budgets: Numbers of parameters, or fractions of them up to 1.
        surveys: What is known of the layers.
        plan: Returns the plan for a budget that can be met.
        parameters: Numbers in the model now.
        stored: Bytes of the model now.
        itemsize: Bytes of a number in the layer of an index.
    """
    smallest = parameters - sum(known.parameters - _smallest(known) for known in surveys)
    found = []
    for budget in budgets:
        if (budget * parameters if budget <= 1 else budget) < smallest:
            share = f"{smallest:,} parameters, {smallest / parameters:.1%}".replace("%", " %")
            found.append(
                Outlook(budget, None, problem=f"cannot be met: with every layer at its smallest it is {share}")
            )
            continue
        report = plan(budget)
        saved = sum(itemsize(i) * (layer.before - layer.after) for i, layer in enumerate(report.layers))
        found.append(Outlook(budget, report, stored - saved))
    return tuple(found)


def _smallest(known: Survey) -> int:
    return min((int(options.parameters.min()) for _, options in known.menu), default=known.parameters)


def unreadable(dtype: str) -> str:
    """Return why numbers of a type are not analysed, or an empty string.

    Example:
        >>> unreadable("float32"), unreadable("int8")
        ('', 'its numbers are int8, not plain floating-point ones: dequantise them first')
    """
    if dtype in DTYPES:
        return ""
    return f"its numbers are {dtype}, not plain floating-point ones: dequantise them first"


def unreadable_tensor(tensor: Tensor) -> str:
    """Return why a parameter in memory is not analysed, or an empty string."""
    if type(tensor.data) is not Tensor:
        return f"its weight is a {type(tensor.data).__name__}: analyse it before sharding or quantising"
    if tensor.numel() == 0:
        return "its weight is empty"
    if tensor.layout != torch.strided:
        return "its weight is sparse"
    return unreadable(str(tensor.dtype).removeprefix("torch."))
