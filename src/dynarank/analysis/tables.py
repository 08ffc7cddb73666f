"""The two tables of an analysis, as rows of text: one line for each weight, one for each budget."""

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from dynarank._tables import aligned
from dynarank.analysis.spectra import Spectrum
from dynarank.compress.report import CompressedLayer, CompressionReport

if TYPE_CHECKING:
    from dynarank.analysis.findings import Analysis, LayerAnalysis, Outlook

NOTHING = "–"
WHOLE = "(the model)"  # a layer without a name
UNITS = ((1e9, "G"), (1e6, "M"), (1e3, "k"))
USUAL = 0.5  # the layers are shown at the budget nearest to it
LEGEND = (
    "90 %, 95 %, 99 %: smallest rank that keeps so much of the sum of the squared weights.",
    "stable, effective: how many directions the weight uses, by its norms and by the entropy of its singular values.",
    "above noise: singular values that a matrix of random entries, of the level found in the weight, would not have.",
    "pays to: largest rank at which two factors hold fewer numbers than the weight.",
)


@dataclass(frozen=True)
class Table:
    """Rows of text under the names of their columns.

    Args:
        head: Names of the columns.
        rows: Cells, as many in each row.
        right: Indices of the columns with numbers.
    """

    head: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    right: tuple[int, ...]


@dataclass(frozen=True)
class _Column:
    head: str
    cell: Callable[[Any], str]
    number: bool = True


def as_text(analysis: "Analysis") -> str:
    """Return the tables and what their columns mean."""
    parts = [aligned(t.head, list(t.rows), right=t.right) for t in (layer_table(analysis), budget_table(analysis))]
    return "\n".join([parts[0], "", *legend(analysis), "", parts[1]])


def layer_table(analysis: "Analysis") -> Table:
    """Return what there is to know of each weight; columns that would be empty are left out."""
    return _table(_layer_columns(analysis), analysis.layers)


def budget_table(analysis: "Analysis") -> Table:
    """Return what the model comes to at each budget."""
    return _table(_budget_columns(analysis), analysis.outlooks)


def legend(analysis: "Analysis") -> Iterator[str]:
    """Yield what the columns mean, in one sentence each."""
    yield from LEGEND
    if analysis.calibrated:
        yield "sensitivity: divergence of the model's outputs per unit of the layer's relative squared output error."
    if (found := usual(analysis)) is not None:
        yield f"at {budget_text(found[0])}: rank and size of the weight when the model is cut to that budget."
    outputs, weights = "divergence of the outputs that each layer's error should cause", "relative squared errors"
    yield f"damage: {outputs if analysis.calibrated else weights}, summed over the layers; 0 for the model as it is."


def usual(analysis: "Analysis") -> tuple[float, CompressionReport] | None:
    """Return the budget that comes nearest to one half, and its plan; None if no budget can be met."""
    met = [(outlook.budget, outlook.plan) for outlook in analysis.outlooks if outlook.plan is not None]
    return min(met, key=lambda one: abs(one[1].parameters_after / analysis.parameters - USUAL), default=None)


def budget_text(budget: float) -> str:
    """Return a budget as it was meant.

    Example:
        >>> budget_text(0.33), budget_text(20_000)
        ('33 %', '20,000')
    """
    return f"{100 * budget:.4g} %" if budget <= 1 else f"{budget:,.0f}"


def _table(columns: Iterable[_Column], items: Iterable[Any]) -> Table:
    columns = list(columns)
    rows = tuple(tuple(column.cell(item) for column in columns) for item in items)
    return Table(tuple(c.head for c in columns), rows, tuple(i for i, c in enumerate(columns) if c.number))


def _layer_columns(analysis: "Analysis") -> Iterator[_Column]:
    def of_spectrum(cell: Callable[[Spectrum], str]) -> Callable[["LayerAnalysis"], str]:
        return lambda layer: NOTHING if layer.spectrum is None else cell(layer.spectrum)

    yield _Column("layer", lambda layer: layer.name or WHOLE, number=False)
    yield _Column("kind", lambda layer: layer.kind, number=False)
    yield _Column("shape", lambda layer: f"{layer.matrix_shape[0]} x {layer.matrix_shape[1]}")
    yield _Column("numbers", lambda layer: f"{layer.parameters:,}")
    yield _Column("90 %", of_spectrum(lambda s: str(s.rank_90)))
    yield _Column("95 %", of_spectrum(lambda s: str(s.rank_95)))
    yield _Column("99 %", of_spectrum(lambda s: str(s.rank_99)))
    yield _Column("stable", of_spectrum(lambda s: f"{s.stable_rank:.1f}"))
    yield _Column("effective", of_spectrum(lambda s: f"{s.effective_rank:.1f}"))
    yield _Column("above noise", of_spectrum(lambda s: str(s.noise.above)))
    yield _Column("pays to", lambda layer: str(layer.break_even))
    if analysis.calibrated:
        yield _Column("sensitivity", lambda layer: _number(layer.sensitivity, ".3g"))
    if analysis.flops is not None:
        yield _Column("MFLOPs", lambda layer: _number(layer.flops, ",.2f", 1e-6))
    if analysis.seconds is not None:
        yield _Column("ms", lambda layer: _number(layer.seconds, ".3f", 1e3))
    if (found := usual(analysis)) is not None:
        fates = {layer.name: layer for layer in found[1].layers}
        yield _Column(f"at {budget_text(found[0])}", lambda layer: _fate(layer, fates.get(layer.name)))
    yield _Column("", _remark, number=False)


def _budget_columns(analysis: "Analysis") -> Iterator[_Column]:
    def of_plan(cell: Callable[[CompressionReport], str]) -> Callable[["Outlook"], str]:
        return lambda outlook: NOTHING if outlook.plan is None else cell(outlook.plan)

    yield _Column("budget", lambda outlook: budget_text(outlook.budget), number=False)
    yield _Column("parameters", of_plan(lambda plan: f"{plan.parameters_after:,}"))
    yield _Column("of model", of_plan(lambda plan: f"{100 * plan.parameters_after / analysis.parameters:.1f} %"))
    yield _Column("bytes", lambda outlook: NOTHING if outlook.bytes is None else _size(outlook.bytes))
    if analysis.flops is not None:
        yield _Column("MFLOPs", of_plan(lambda plan: _number(plan.flops_after, ",.2f", 1e-6)))
    if analysis.seconds is not None:
        yield _Column("ms", of_plan(lambda plan: _number(plan.seconds_after, ".3f", 1e3)))
        yield _Column("speed-up", lambda outlook: _number(outlook.speed_up, ".2f"))
    yield _Column("layers cut", of_plan(lambda plan: f"{len(plan.compressed)} of {len(analysis.replaceable)}"))
    yield _Column("damage", lambda outlook: _number(outlook.damage, ".4g"))
    yield _Column("", lambda outlook: outlook.problem, number=False)


def _number(value: float | None, form: str, factor: float = 1) -> str:
    return NOTHING if value is None else format(factor * value, form)


def _size(value: float) -> str:
    unit, letter = next(((u, name) for u, name in UNITS if value >= u), (1, ""))
    return f"{value / unit:.4g} {letter}B"


def _fate(layer: "LayerAnalysis", planned: CompressedLayer | None) -> str:
    """Return rank and size of a layer in a plan."""
    if layer.reason or planned is None:
        return NOTHING
    if not planned.form:
        return "whole"
    form = "" if planned.form == "matrix" else f"{planned.form} "
    return f"{form}{', '.join(map(str, planned.rank))} ({100 * planned.after / planned.before:.0f} %)"


def _remark(layer: "LayerAnalysis") -> str:
    if layer.reason or layer.rank is None:
        return layer.reason
    return f"low-rank already, rank {layer.rank}"
