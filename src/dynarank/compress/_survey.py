"""Looking at every layer before anything is changed: what it could become, at what error and what cost."""

from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import nn

from dynarank import cost
from dynarank.compress.forms.base import AbstractForm, Options
from dynarank.compress.sensitivity import Damage, Divergence, measure_damage, unmeasured
from dynarank.compress.timing import LayerTimes, time_layer
from dynarank.factorize.sites import ChosenSite
from dynarank.layers.base import AbstractLowRankLayer
from dynarank.measure import Forward, Moments, Trace, evaluating, flops, input_moments, run, trace, unfused

TOO_SMALL = "too small: no replacement would hold fewer numbers"
NOT_CALLED = "the model does not call it"
TIED_BIAS = "its bias is tied to that of another layer"
PROBED = 2  # calibration batches on which sensitivities are measured


@dataclass(frozen=True)
class Survey:
    """What is known of one layer. The layer itself is not held, so that its weight can be freed.

    Args:
        name: Its first qualified name.
        kind: ``"linear"``, ``"conv2d"``, ... or the name of its class.
        shape: ``(m, n)`` of the weight as a matrix, or None where it holds several.
        parameters: Numbers in its weight.
        multiplications: Multiplications in one forward pass as traced; 0 without a trace.
        menu: Forms with the options they offer; empty where the layer is left alone.
        reason: Why it stays as it is; empty where it has options.
        damage: What errors of its outputs do to the outputs of the model.
        trace: What it saw in one forward pass, or None.
        times: How long it and its replacements take, or None.
    """

    name: str
    kind: str
    shape: tuple[int, int] | None
    parameters: int
    multiplications: int = 0
    menu: tuple[tuple[AbstractForm, Options], ...] = ()
    reason: str = ""
    damage: Damage = field(default_factory=unmeasured)
    trace: Trace | None = None
    times: LayerTimes | None = None


class MomentStore:
    """The moments of the inputs of many layers, as many at a time as fit into memory.

    Args:
        model: The model.
        names: Layers in the order in which they will be asked for.
        batches: Calibration batches, or None: then there are no moments.
        forward: How a batch goes through the model.
        memory: Bytes that moments may take.
    """

    def __init__(
        self,
        model: nn.Module,
        names: Sequence[str],
        batches: Sequence[Any] | None,
        *,
        forward: Forward,
        memory: int,
    ) -> None:
        self.model, self.batches, self.forward = model, batches, forward
        self.groups = list(_groups(model, names, memory)) if batches is not None else []
        self._held: dict[str, Moments] = {}
        self._group = -1

    def of(self, name: str) -> Moments | None:
        """Return the moments of a layer; None without calibration, or where the model does not call it."""
        wanted = next((i for i, group in enumerate(self.groups) if name in group), None)
        if wanted is not None and wanted != self._group:
            self._held.clear()
            assert self.batches is not None
            layers = {name: self.model.get_submodule(name) for name in self.groups[wanted]}
            self._held = input_moments(self.model, layers, self.batches, forward=self.forward)
            self._group = wanted
        return self._held.get(name)


def _groups(model: nn.Module, names: Sequence[str], memory: int) -> Iterator[list[str]]:
    """Yield as many names at a time as have moments that fit into memory."""
    group: list[str] = []
    taken = 0
    for name in names:
        weight: Any = model.get_submodule(name).weight
        size = 8 * (weight.numel() // weight.shape[0]) ** 2
        if group and taken + size > memory:
            yield group
            group, taken = [], 0
        group.append(name)
        taken += size
    if group:
        yield group


def survey(
    model: nn.Module,
    sites: Iterable[ChosenSite],
    forms: Sequence[AbstractForm],
    store: MomentStore,
    *,
    batches: Sequence[Any] | None,
    divergence: Divergence | None,
    rank_multiple: int,
    seconds: float | None,
) -> list[Survey]:
    """Return what is known of every layer.

    Args:
        model: The model, which is left as it was.
        sites: Its layers.
        forms: Forms to consider.
        store: Moments of the inputs, and how a batch goes through the model.
        batches: Calibration batches, or None.
        divergence: What change of the model's outputs counts; None where sensitivities are not measured.
        rank_multiple: Ranks are multiples of it, where a layer has room for two of them.
        seconds: Time to spend on timing one replacement; None where layers are not timed.
    """
    sites = list(sites)
    layers = {chosen.site.name: chosen.site.module for chosen in sites if not chosen.reason}
    traces = trace(model, layers, batches[0], forward=store.forward) if batches else {}
    biases = Counter(id(module._parameters.get("bias")) for module in model.modules())
    found = []
    with evaluating(model):
        probes = probes_of(model, batches, store.forward) if divergence and batches else []
        for chosen in sites:
            site, layer = chosen.site, chosen.site.module
            seen = traces.get(site.name)
            reason = chosen.reason or _own_reason(layer, seen, biases)
            known = Survey(
                site.name,
                site.kind,
                _shape(layer),
                numbers_in(layer),
                _multiplications(layer, seen),
                reason=reason,
                trace=seen,
            )
            if known.reason:
                found.append(known)
                continue
            moments = store.of(site.name)
            menu = tuple(_menu(layer, forms, moments, seen, known.parameters, rank_multiple))
            times = time_layer(layer, seen, menu, seconds=seconds) if seconds and seen and menu else None
            damage = known.damage
            if divergence and probes and menu:
                damage = measure_damage(
                    model, layer, menu, moments, probes, forward=store.forward, divergence=divergence
                )
            reason = "" if menu else TOO_SMALL
            found.append(replace(known, menu=menu, times=times, damage=damage, reason=reason))
    return found


def _own_reason(layer: Any, seen: Trace | None, biases: Counter[int]) -> str:
    if seen is not None and seen.calls == 0:
        return NOT_CALLED
    return TIED_BIAS if layer.bias is not None and biases[id(layer.bias)] > 1 else ""


def _shape(layer: Any) -> tuple[int, int] | None:
    """Return the shape of the weight as a matrix, where there is one weight."""
    weight = layer.weight if isinstance(layer, AbstractLowRankLayer) else layer._parameters.get("weight")
    if weight is None or nn.parameter.is_lazy(weight) or weight.dim() < 2:
        return None
    return weight.shape[0], weight.numel() // max(1, weight.shape[0])


def check_current(model: nn.Module, surveys: Iterable[Survey]) -> None:
    """Refuse to use what is known of layers that are others now.

    Raises:
        RuntimeError: A layer holds another number of parameters.
    """
    for known in surveys:
        if known.menu and numbers_in(model.get_submodule(known.name)) != known.parameters:
            raise RuntimeError(
                f"{known.name} has changed since the model was looked at. Build a new Compressor after each change."
            )


def numbers_in(layer: Any) -> int:
    """Return the numbers in the weights of a layer as it is deployed."""
    if isinstance(layer, AbstractLowRankLayer):
        return cost.deployed_parameters(*layer.matrix_shape, layer.rank)
    held = [p for p in layer._parameters.values() if p is not None and not nn.parameter.is_lazy(p)]
    return sum(p.numel() for p in held if p.dim() >= 2)


def _multiplications(layer: Any, seen: Trace | None) -> int:
    """Return the multiplications of a layer as traced; those of a low-rank one depend on how it is stored."""
    if seen is None or not isinstance(layer, AbstractLowRankLayer):
        return numbers_in(layer) * seen.rows if seen else 0
    like = next(layer.parameters())
    return flops(layer, seen.inputs, forward=lambda layer, shapes: [layer(like.new_zeros(s)) for s in shapes]) // 2


def _menu(
    layer: Any, forms: Sequence[AbstractForm], moments: Moments | None, seen: Trace | None, size: int, multiple: int
) -> Iterator[tuple[AbstractForm, Options]]:
    for form in forms:
        if form.accepts(layer):
            options = _rounded(form.options(layer, moments, seen), size, multiple)
            if options.ranks:
                yield form, options


def _rounded(options: Options, size: int, multiple: int) -> Options:
    """Return the options that are smaller than the layer and have ranks that the hardware likes."""
    smaller = [i for i, p in enumerate(options.parameters.tolist()) if p < size]
    even = [i for i in smaller if all(rank % multiple == 0 for rank in options.ranks[i])]
    keep = even if len(even) >= 2 else smaller
    return Options(
        options.form,
        tuple(options.ranks[i] for i in keep),
        options.errors[keep].cpu(),  # found where the layer is
        options.parameters[keep],
        options.multiplications[keep],
    )


@torch.no_grad()
def probes_of(model: nn.Module, batches: Sequence[Any], forward: Forward) -> list[tuple[Any, Any]]:
    """Return the first batches with the outputs of the model as it is."""
    with unfused():
        return [(batch, run(forward, model, batch, index)) for index, batch in enumerate(batches[:PROBED])]
