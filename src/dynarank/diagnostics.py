"""What the low-rank layers of a model look like now, and what trains them."""

from dataclasses import asdict, dataclass
from typing import Any

from torch import nn

from dynarank.layers._factored import AbstractFactoredLayer, factored_layers

BASELINE = "plain U V^T"
CORE = "core"


@dataclass(frozen=True)
class LayerSummary:
    """One low-rank layer.

    Args:
        name: Qualified name.
        kind: Class of the layer.
        shape: ``(m, n)`` of the weight as a matrix.
        rank: Directions in use; of a layer in Tucker form, those of the outputs.
        capacity: Rows stored; those beyond the rank are zero.
        form: ``"pair"`` or ``"core"``.
        parameters: Numbers in the weight as deployed: its factors, or dense where that is smaller.
        dense_parameters: Numbers in the dense weight.
        driver: What trains it, in a few words.
        ranks: Ranks of all modes; ``rank`` alone for a matrix.
        capacities: Directions stored along each of these.
    """

    name: str
    kind: str
    shape: tuple[int, int]
    rank: int
    capacity: int
    form: str
    parameters: int
    dense_parameters: int
    driver: str
    ranks: tuple[int, ...]
    capacities: tuple[int, ...]


@dataclass(frozen=True)
class ModelSummary:
    """All low-rank layers of a model. ``print(summary)`` shows a table.

    Args:
        layers: One entry each, in the order of ``model.named_modules()``.
        other_parameters: Numbers in all parameters that are not factors.
        notes: What there is to know about the training.
    """

    layers: tuple[LayerSummary, ...]
    other_parameters: int
    notes: tuple[str, ...] = ()

    def as_dict(self) -> dict[str, Any]:
        """Return the summary as a plain dictionary that JSON can hold."""
        return asdict(self)

    def __str__(self) -> str:
        head = ("layer", "kind", "shape", "rank", "stored", "numbers", "of dense", "trained by")
        table = _aligned([head, *map(_row, self.layers)])
        now, dense = (sum(getattr(e, key) for e in self.layers) for key in ("parameters", "dense_parameters"))
        share = f", {now / dense:.1%} of the dense {dense:,}" if dense else ""
        total = f"{len(self.layers)} low-rank layers hold {now:,} numbers{share}; {self.other_parameters:,} others."
        return "\n".join([table, total, *self.notes])


def summary(model: Any, optimizer: Any = None) -> ModelSummary:
    """Return what the low-rank layers look like and what trains them.

    Args:
        model: A model, or a ``LowRankOptimizer``, which knows its model.
        optimizer: What trains the model, if anything does: a ``LowRankOptimizer`` or one of ``torch.optim``.

    Raises:
        TypeError: ``model`` is an optimizer that does not know its model.

    Example:
        >>> import torch
        >>> from dynarank.layers.linear import LowRankLinear
        >>> model = nn.Sequential(LowRankLinear(100, 50, rank=4, rank_multiple=8), nn.Linear(50, 10))
        >>> print(summary(model, torch.optim.AdamW(model.parameters())))
        layer  kind           shape     rank  stored  numbers  of dense  trained by
        0      LowRankLinear  50 x 100     4       8      600     12.0%  AdamW: plain U V^T
        1 low-rank layers hold 600 numbers, 12.0% of the dense 5,000; 560 others.
        AdamW trains the factors as ordinary parameters: plain U V^T training, the baseline, with ranks that stay. \
For training on the manifold use LowRankOptimizer.
    """
    if not isinstance(model, nn.Module):
        model, optimizer = getattr(model, "model", None), model
    if not isinstance(model, nn.Module):
        raise TypeError(f"summary needs a model beside {type(optimizer).__name__}. Call summary(model, optimizer).")
    layers = factored_layers(model)
    entries = tuple(_entry(name, layer, optimizer) for name, layer in layers.items())
    factors = {id(p) for layer in layers.values() for p in _factors(layer)}
    others = sum(p.numel() for p in model.parameters() if id(p) not in factors and not nn.parameter.is_lazy(p))
    return ModelSummary(entries, others, _notes(entries, optimizer))


def _entry(name: str, layer: AbstractFactoredLayer, optimizer: Any) -> LayerSummary:
    return LayerSummary(
        name,
        type(layer).__name__,
        layer.matrix_shape,
        layer.rank,
        layer.capacity,
        layer.form,
        layer.deployed_parameters(),
        layer.dense_parameters,
        _driver(layer, optimizer),
        layer.all_ranks,
        layer.all_capacities,
    )


def _factors(layer: AbstractFactoredLayer) -> list[nn.Parameter]:
    return [p for name in layer.factor_names if (p := layer._parameters.get(name)) is not None]


def _driver(layer: AbstractFactoredLayer, optimizer: Any) -> str:
    """Return what trains a layer; optimizers are told apart by what they have, since they are defined below."""
    factors = _factors(layer)
    if not any(p.requires_grad for p in factors):
        return "nothing: frozen"
    if optimizer is None:
        return "-"
    kind = type(optimizer).__name__
    if any(layer is driven for driven in getattr(optimizer, "layers", {}).values()):
        return f"{kind}: {type(optimizer.integrator).__name__}"
    held = {id(p) for group in optimizer.param_groups for p in group["params"]}
    if not any(id(p) in held for p in factors):
        return f"nothing: not in {kind}"
    return f"{kind}: {CORE if layer.form == 'core' else BASELINE}"


def _notes(entries: tuple[LayerSummary, ...], optimizer: Any) -> tuple[str, ...]:
    kind, notes = type(optimizer).__name__, []
    if any(entry.driver.endswith(BASELINE) for entry in entries):
        notes.append(
            f"{kind} trains the factors as ordinary parameters: plain U V^T training, the baseline, with ranks that "
            "stay. For training on the manifold use LowRankOptimizer."
        )
    if any(entry.driver.endswith(f": {CORE}") for entry in entries):
        notes.append(f"{kind} trains the cores between bases that stay.")
    if left := [entry.name for entry in entries if entry.driver.startswith("nothing: not")]:
        notes.append(f"{', '.join(left)}: not in the optimizer, so nothing trains them; use add_param_group.")
    if getattr(optimizer, "rank_policy", None) is not None:
        base = getattr(optimizer, "base", None)
        rest = f"; {type(base).__name__} trains all the rest" if base is not None else ""
        state = "ranks are frozen" if optimizer.frozen else f"ranks follow {type(optimizer.rank_policy).__name__}"
        notes.append(f"After step {optimizer.steps} {state}{rest}.")
    return tuple(notes)


def _row(entry: LayerSummary) -> tuple[str, ...]:
    share = f"{entry.parameters / entry.dense_parameters:.1%}"
    stored = _product(entry.capacities) if entry.form == "pair" else "core"
    shape, ranks = _product(entry.shape), _product(entry.ranks)
    return entry.name, entry.kind, shape, ranks, stored, f"{entry.parameters:,}", share, entry.driver


def _product(sizes: tuple[int, ...]) -> str:
    return " x ".join(map(str, sizes))


def _aligned(rows: list[tuple[str, ...]]) -> str:
    """Return a table whose columns of numbers, the fourth to the seventh, stand to the right."""
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    pads = [str.rjust if 3 <= column <= 6 else str.ljust for column in range(len(widths))]
    lines = ([pad(cell, width) for cell, width, pad in zip(row, widths, pads, strict=True)] for row in rows)
    return "\n".join("  ".join(line).rstrip() for line in lines)
