"""What ``compress_`` did, layer by layer: data that prints itself as a table."""

from dataclasses import asdict, dataclass
from typing import Any


@dataclass(frozen=True)
class CompressedLayer:
    """What became of one layer.

    Args:
        name: Qualified name.
        kind: ``"linear"``, ``"conv2d"``, ... or the name of the class.
        shape: ``(m, n)`` of the weight as a matrix; None where it has several.
        form: ``"matrix"``, ``"spatial"``, ``"tucker"``; empty where the layer stays as it is.
        rank: Its rank; two for a form with two; empty where the layer stays as it is.
        before: Numbers in the weight before.
        after: Numbers in the weight now.
        error: Relative squared error of the layer's outputs, or of its weight without calibration.
        damage: Divergence of the model's outputs that this error alone should cause; the error itself where that was
            not measured.
        reason: Why it stays as it is; empty otherwise.
        seconds_before: Measured seconds before, or None where layers were not timed.
        seconds_after: Expected seconds now, or None.
    """

    name: str
    kind: str
    shape: tuple[int, int] | None
    form: str
    rank: tuple[int, ...]
    before: int
    after: int
    error: float = 0.0
    damage: float = 0.0
    reason: str = ""
    seconds_before: float | None = None
    seconds_after: float | None = None


@dataclass(frozen=True)
class CompressionReport:
    """What ``compress_`` did. ``print(report)`` shows a table.

    Args:
        layers: One per layer with a weight matrix, in the order of ``model.named_modules()``.
        measure: What the budget counts.
        budget: What was allowed, in the unit of the measure.
        cost_before: Cost of the model before.
        cost_after: Cost of the model now; for latency the predicted one.
        parameters_before: Numbers in the model before, as deployed.
        parameters_after: Numbers in the model now, as deployed.
        flops_before: Operations of one forward pass before, or None without calibration.
        flops_after: The same now.
        seconds_before: Measured seconds of one forward pass before, or None where layers were not timed.
        seconds_after: Predicted seconds of one forward pass now, or None.
        notes: What concerns the model as a whole.
    """

    layers: tuple[CompressedLayer, ...]
    measure: str
    budget: float
    cost_before: float
    cost_after: float
    parameters_before: int
    parameters_after: int
    flops_before: int | None = None
    flops_after: int | None = None
    seconds_before: float | None = None
    seconds_after: float | None = None
    notes: tuple[str, ...] = ()

    @property
    def compressed(self) -> tuple[CompressedLayer, ...]:
        """Layers that were replaced."""
        return tuple(layer for layer in self.layers if layer.form)

    @property
    def kept(self) -> tuple[CompressedLayer, ...]:
        """Layers that stay as they are, each with its reason."""
        return tuple(layer for layer in self.layers if not layer.form)

    def as_dict(self) -> dict[str, Any]:
        """Return the report as a plain dictionary that JSON can hold."""
        return asdict(self)

    def __str__(self) -> str:
        head = ("layer", "kind", "shape", "form", "rank", "before", "after", "error", "damage", "")
        table = _aligned([head, *map(_row, self.layers)])
        return "\n".join([table, *self._totals(), *self.notes])

    def _totals(self) -> list[str]:
        lines = [
            f"{len(self.compressed)} of {len(self.layers)} layers compressed; the model goes from "
            f"{self.parameters_before:,} to {self.parameters_after:,} parameters "
            f"({self.parameters_after / self.parameters_before:.1%})."
        ]
        if self.flops_before and self.flops_after:
            share = self.flops_after / self.flops_before
            lines.append(f"FLOPs of a forward pass: {self.flops_before:,} to {self.flops_after:,} ({share:.1%}).")
        if self.seconds_before and self.seconds_after:
            share = self.seconds_after / self.seconds_before
            lines.append(
                f"Time of a forward pass: {1e3 * self.seconds_before:.2f} ms measured, "
                f"{1e3 * self.seconds_after:.2f} ms predicted ({share:.1%})."
            )
        return lines


def _row(layer: CompressedLayer) -> tuple[str, ...]:
    return (
        layer.name,
        layer.kind,
        f"{layer.shape[0]} x {layer.shape[1]}" if layer.shape else "?",
        layer.form or "as it is",
        ", ".join(map(str, layer.rank)) or "-",
        f"{layer.before:,}",
        f"{layer.after:,}",
        f"{layer.error:.4f}" if layer.form else "-",
        f"{layer.damage:.4f}" if layer.form else "-",
        layer.reason,
    )


def _aligned(rows: list[tuple[str, ...]]) -> str:
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    right = (2, 4, 5, 6, 7, 8)
    pads = [str.rjust if column in right else str.ljust for column in range(len(widths))]
    lines = ([pad(cell, width) for cell, width, pad in zip(row, widths, pads, strict=True)] for row in rows)
    return "\n".join("  ".join(line).rstrip() for line in lines)
