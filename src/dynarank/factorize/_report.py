"""What was replaced, what was left alone and why: data that prints itself as a table."""

from dataclasses import asdict, dataclass
from typing import Any, Literal

from dynarank._tables import aligned


@dataclass(frozen=True)
class LayerEntry:
    """What ``factorize_`` did with one weight.

    Args:
        name: Qualified name of the layer, or of the parameter where a module holds several.
        kind: ``"linear"``, ``"conv2d"``, ... for layers with a low-rank twin; otherwise the name of the class.
        shape: ``(m, n)`` of the weight as a matrix; None where it is not known yet.
        status: Whether the layer was factorised, stays dense, or was low-rank before.
        rank: Rank it starts with; None for a dense weight.
        before: Numbers in the weight before, without the bias.
        after: Numbers in the weight as deployed now, without the bias.
        reason: Why it stays dense; empty otherwise.
        note: What else there is to know; often empty.
        ranks: Ranks of all modes of a layer in Tucker form, out, in, height, width; else ``rank`` alone, if any.
    """

    name: str
    kind: str
    shape: tuple[int, int] | None
    status: Literal["factorized", "dense", "low-rank before"]
    rank: int | None
    before: int
    after: int
    reason: str = ""
    note: str = ""
    ranks: tuple[int, ...] = ()


@dataclass(frozen=True)
class FactorizationReport:
    """What ``factorize_`` did, weight by weight. ``print(report)`` shows a table.

    Args:
        entries: One per weight of at least two dimensions, in the order of ``model.named_modules()``.
        before: Numbers in the whole model before, as deployed: parameters and buffers, shared ones once.
        after: Numbers in the whole model now, as deployed.
        notes: How the classifier head was found, and what concerns the model as a whole.
    """

    entries: tuple[LayerEntry, ...]
    before: int
    after: int
    notes: tuple[str, ...] = ()

    @property
    def factorized(self) -> tuple[LayerEntry, ...]:
        """Layers that were replaced."""
        return tuple(entry for entry in self.entries if entry.status == "factorized")

    @property
    def kept_dense(self) -> tuple[LayerEntry, ...]:
        """Weights that stay dense, each with its reason."""
        return tuple(entry for entry in self.entries if entry.status == "dense")

    def as_dict(self) -> dict[str, Any]:
        """Return the report as a plain dictionary that JSON can hold."""
        return asdict(self)

    def __str__(self) -> str:
        rows = [_entry_row(entry) for entry in self.entries]
        table = aligned(("layer", "kind", "shape", "rank", "before", "after", ""), rows, right=(2, 3, 4, 5))
        share = f" ({100 * self.after / self.before:.1f} %)" if self.before else ""
        total = (
            f"{len(self.factorized)} of {len(self.entries)} weights factorised; "
            f"the model goes from {self.before:,} to {self.after:,} numbers{share} as deployed."
        )
        return "\n".join([table, total, *self.notes])


def _entry_row(entry: LayerEntry) -> tuple[str, ...]:
    rank = " x ".join(map(str, entry.ranks)) or "-"
    remark = f"dense: {entry.reason}" if entry.status == "dense" else entry.note
    if entry.status == "low-rank before":
        remark = "low-rank before, left as it is"
    return entry.name, entry.kind, _size(entry.shape), rank, f"{entry.before:,}", f"{entry.after:,}", remark


def _size(shape: tuple[int, int] | None) -> str:
    return "?" if shape is None else f"{shape[0]} x {shape[1]}"


@dataclass(frozen=True)
class MergedLayer:
    """What became of one low-rank layer.

    Args:
        name: Qualified name of the layer.
        shape: ``(m, n)`` of the weight as a matrix.
        rank: Rank it had.
        form: ``"dense"``, or ``"plain"`` for plain layers in a row.
        error: ``||W' - W||_F / ||W||_F`` of what is now stored against the product of the factors, both in at least
            float32: what the cast to the layer's dtype costs.
        note: Why the layer is dense although plain ones in a row were asked for; otherwise empty.
        ranks: Ranks of all modes, out, in, height, width, where there were several; else ``rank`` alone.
    """

    name: str
    shape: tuple[int, int]
    rank: int
    form: Literal["dense", "plain"]
    error: float
    note: str = ""
    ranks: tuple[int, ...] = ()


@dataclass(frozen=True)
class MergeReport:
    """What ``merge_`` or ``to_plain_`` did, layer by layer. ``print(report)`` shows a table."""

    entries: tuple[MergedLayer, ...]

    @property
    def largest_error(self) -> float:
        """Largest relative error of any layer."""
        return max((entry.error for entry in self.entries), default=0.0)

    def as_dict(self) -> dict[str, Any]:
        """Return the report as a plain dictionary that JSON can hold."""
        return asdict(self)

    def __len__(self) -> int:
        return len(self.entries)

    def __str__(self) -> str:
        rows = [
            (e.name, _size(e.shape), " x ".join(map(str, e.ranks or (e.rank,))), _now(e), f"{e.error:.1e}", e.note)
            for e in self.entries
        ]
        table = aligned(("layer", "shape", "rank", "now", "error", ""), rows, right=(1, 2, 4))
        return f"{table}\n{len(self)} low-rank layers replaced; largest relative error {self.largest_error:.1e}."


def _now(entry: MergedLayer) -> str:
    if entry.form == "dense":
        return "dense"
    return "three layers" if len(entry.ranks) > 1 else "two layers"
