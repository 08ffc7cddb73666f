"""``speed_plan``: for each low-rank layer of a model, whether it is faster dense, factored or multiplied out."""

import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from torch import nn

from dynarank._tables import aligned
from dynarank.cost_model.calibration import costs_here
from dynarank.cost_model.costs import AbstractCosts
from dynarank.cost_model.work import FORMS, PURPOSES, Form, Purpose
from dynarank.errors import unknown_name
from dynarank.factorize import merge_
from dynarank.factorize._speed import work_seen
from dynarank.factorize.sites import attention_projections
from dynarank.layers._factored import AbstractFactoredLayer, factored_layers
from dynarank.layers.base import AbstractLowRankLayer, low_rank_layers
from dynarank.layers.conv2d import LowRankConv2d
from dynarank.layers.linear import LowRankLinear
from dynarank.measure import Forward, Trace, call, trace


@dataclass(frozen=True)
class LayerChoice:
    """What is fastest for one low-rank layer.

    Args:
        name: Qualified name of the layer.
        shape: ``(m, n)`` of the weight as a matrix.
        rank: Rows of the factors that it computes with.
        rows: Rows that the weight is multiplied by in one pass, over all calls.
        seconds: Expected seconds of each form in one pass; None without a calibration.
        now: How the layer computes at present: through its factors, or with ``W`` multiplied out in every pass.
        choice: The fastest form that the purpose allows: in training, only those in which the layer stays low-rank.
        fastest: The fastest form of all.
        multiplies_out_from: Rank from which on multiplying out is faster than the factors.
        note: What else there is to know; often empty.
    """

    name: str
    shape: tuple[int, int]
    rank: int
    rows: int
    seconds: Mapping[Form, float] | None
    now: Form
    choice: Form
    fastest: Form
    multiplies_out_from: int
    note: str = ""

    @property
    def gain(self) -> float | None:
        """How many times as fast the layer becomes; None without a calibration."""
        return None if self.seconds is None else self.seconds[self.now] / self.seconds[self.choice]


@dataclass(frozen=True)
class SpeedPlan:
    """How each low-rank layer of a model should compute. ``print(plan)`` shows a table.

    Args:
        purpose: What for.
        source: Where the decisions come from: the machine that was measured, or the rule of thumb.
        layers: What was chosen, layer by layer.
        skipped: Layers that nothing is said about, each with the reason.
    """

    purpose: Purpose
    source: str
    layers: tuple[LayerChoice, ...]
    skipped: Mapping[str, str]

    @property
    def should_be_dense(self) -> tuple[str, ...]:
        """Layers that would be fastest dense."""
        return tuple(layer.name for layer in self.layers if layer.fastest == "dense")

    @property
    def totals(self) -> dict[str, float] | None:
        """Expected seconds in one pass of all layers of the plan: ``now``, by the ``plan``, and all ``dense``.

        None without a calibration. Whatever else the model computes is not counted, such as what is skipped.
        """
        timed = [(layer, layer.seconds) for layer in self.layers if layer.seconds is not None]
        if len(timed) < len(self.layers):
            return None
        return {
            "now": sum(seconds[layer.now] for layer, seconds in timed),
            "plan": sum(seconds[layer.choice] for layer, seconds in timed),
            "dense": sum(seconds["dense"] for _, seconds in timed),
        }

    def apply_(self, model: nn.Module) -> tuple[str, ...]:
        """Change the model as planned and return the names of the layers that compute in another way now.

        For inference, exactly the layers that are faster dense are merged, for good. For training, every layer of the
        plan learns from which rank on to multiply out; that follows its rank, changes no parameter and is not saved.

        Args:
            model: The model the plan was made for, or one with the same layers.

        Raises:
            ValueError: A layer of the plan is not there.
            RuntimeError: The model is wrapped for distributed training and a layer is to be merged.
        """
        found = low_rank_layers(model)
        for layer in self.layers:
            if layer.name not in found or found[layer.name].matrix_shape != layer.shape:
                raise ValueError(
                    f"the plan has a low-rank layer {layer.name!r} of shape {layer.shape}, which the model lacks. "
                    "Make a plan for this model."
                )
        changed = tuple(layer.name for layer in self.layers if layer.choice != layer.now)
        if self.purpose == "training":
            for layer in self.layers:
                found[layer.name].multiplies_out_from = layer.multiplies_out_from
        elif changed:
            merge_(model, modules=f"(?:{'|'.join(map(re.escape, changed))})")  # in brackets it is no kind of layer
        return changed

    def as_dict(self) -> dict[str, Any]:
        """Return the plan as a plain dictionary that JSON can hold."""
        return asdict(self) | {"totals": self.totals}

    def __str__(self) -> str:
        head = ("layer", "shape", "rank", "rows", *(f"{form}, ms" for form in FORMS), "now", self.purpose, "gain", "")
        table = aligned(head, [_row(layer) for layer in self.layers], right=(1, 2, 3, 4, 5, 6, 9))
        return "\n".join([table, *self._remarks()])

    def _remarks(self) -> list[str]:
        remarks = [f"By {self.source}."]
        if self.totals is not None:
            now, plan, dense = (f"{1e3 * self.totals[key]:.3g}" for key in ("now", "plan", "dense"))
            remarks.append(
                f"These layers take {now} ms in {self.purpose}, {plan} ms by this plan, {dense} ms all dense."
            )
        else:
            remarks.append("For times of this machine, run: dynarank calibrate")
        if self.purpose == "training" and self.should_be_dense:
            remarks.append(f"Faster if they had stayed dense: {', '.join(self.should_be_dense)}.")
        return [*remarks, *(f"Left alone: {name}: {reason}." for name, reason in self.skipped.items())]


def _row(layer: LayerChoice) -> tuple[str, ...]:
    times = ("-",) * len(FORMS)
    if layer.seconds is not None:
        times = tuple(f"{1e3 * layer.seconds[form]:.3g}" for form in FORMS)
    shape, gain = "{} x {}".format(*layer.shape), "-" if layer.gain is None else f"{layer.gain:.2f}"
    return layer.name, shape, str(layer.rank), str(layer.rows), *times, layer.now, layer.choice, gain, layer.note


def speed_plan(
    model: nn.Module,
    batch: Any,
    *,
    for_: Purpose = "training",
    costs: AbstractCosts | None = None,
    forward: Forward = call,
) -> SpeedPlan:
    """Return how each low-rank layer should compute: dense, through its factors, or with ``W`` multiplied out.

    One forward pass in eval mode tells how many rows each layer sees; the model is not changed, see
    ``SpeedPlan.apply_``. Training counts a forward and a backward pass, without what an optimizer does.

    Args:
        model: A model with low-rank layers.
        batch: A batch of the size that will be used.
        for_: What the model is to be fast in. In training layers stay low-rank.
        costs: What layers cost. By default what ``dynarank calibrate`` measured on this machine, with this type of
            weights and this number of threads, or else the rule of thumb.
        forward: How a batch enters the model.

    Raises:
        ValueError: There is no low-rank layer, the purpose is unknown, or the batch does not fit the model.
        TypeError: ``call`` does not know the kind of the batch.

    Example:
        >>> import torch
        >>> from dynarank.calibration import RuleOfThumb
        >>> from dynarank.factorize import factorize_
        >>> model = nn.Sequential(nn.Linear(256, 512), nn.ReLU(), nn.Linear(512, 256))
        >>> report = factorize_(model, rank=160, include_head=True)
        >>> plan = speed_plan(model, torch.zeros(32, 256), for_="inference", costs=RuleOfThumb())
        >>> [layer.choice for layer in plan.layers]
        ['dense', 'dense']
        >>> plan.apply_(model), model[0]
        (('0', '2'), Linear(in_features=256, out_features=512, bias=True))
    """
    if for_ not in PURPOSES:
        raise unknown_name("purpose", for_, PURPOSES)
    layers = factored_layers(model)
    if not layers:
        raise ValueError("speed_plan found no low-rank layer in the model. factorize_ it first.")
    if costs is None:
        costs, source = costs_here(next(weight for layer in layers.values() for weight in layer.parameters()))
    else:
        source = "the costs that were given"
    projections, chosen, skipped = attention_projections(model), [], {}
    for name, seen in trace(model, layers, batch, forward=forward).items():
        layer = layers[name]
        reason = _reason(layer, seen, reads_weight=id(layer) in projections)
        if reason is None and isinstance(layer, AbstractLowRankLayer):
            chosen.append(_choice(name, layer, seen, for_, costs))
        else:
            skipped[name] = reason
    return SpeedPlan(for_, source, tuple(chosen), skipped)


def _reason(layer: AbstractFactoredLayer, seen: Trace, *, reads_weight: bool) -> str | None:
    """Return why nothing is said about a layer, or None."""
    if type(layer) not in (LowRankLinear, LowRankConv2d):
        return f"times of a {type(layer).__name__} are not known"
    if layer.form == "core":
        return "times of the core form are not known"
    if reads_weight:
        return "nn.MultiheadAttention reads its weight, multiplied out in every pass; merge_ it for inference"
    return None if seen.calls else "it is not called with this batch"


def _choice(name: str, layer: AbstractLowRankLayer, seen: Trace, purpose: Purpose, costs: AbstractCosts) -> LayerChoice:
    convolution = isinstance(layer, LowRankConv2d)
    rank = layer.capacity if layer.active_rank == layer.rank else layer.active_rank
    work = work_seen(seen, layer.matrix_shape, rank, convolution=convolution)
    found, least = costs.of(work, purpose), costs.multiplies_out_from(work, purpose)
    builds = layer.multiplies_out(rank, None if convolution else work.rows)
    stays: Form = "multiplied" if rank >= least else "factored"
    fastest: Form = "dense" if found["dense"] < found[stays] else stays
    return LayerChoice(
        name=name,
        shape=work.shape,
        rank=rank,
        rows=seen.rows,
        seconds=costs.seconds(work, purpose),
        now="multiplied" if builds else "factored",
        choice=stays if purpose == "training" else fastest,
        fastest=fastest,
        multiplies_out_from=least,
        note="should have stayed dense" if purpose == "training" and fastest == "dense" else "",
    )
