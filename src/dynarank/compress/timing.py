"""How long a layer takes as it is and as each replacement: measured at a few ranks, a straight line between them."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from dynarank.compress.forms.base import AbstractForm, Options
from dynarank.measure import Timing, Trace, layer_latency

POINTS = 4  # ranks at which a form is timed


@dataclass(frozen=True)
class LayerTimes:
    """Seconds of one layer in a forward pass as traced.

    Args:
        present: As the layer is.
        forms: By form, the numbers of parameters at which it was timed and the seconds there.
    """

    present: float
    forms: Mapping[str, tuple[Tensor, Tensor]]

    def of(self, options: Options) -> Tensor:
        """Return the seconds of every option, ``(k,)`` float64."""
        sizes, seconds = self.forms[options.form]
        return interpolated(options.parameters.double(), sizes, seconds)


def time_layer(layer: Any, trace: Trace, menu: Sequence[tuple[AbstractForm, Options]], *, seconds: float) -> LayerTimes:
    """Time a layer and, at a few ranks of each form, its replacements; all interleaved.

    Args:
        layer: The layer.
        trace: What it saw.
        menu: Forms with the options they offer.
        seconds: Time to spend on each.
    """
    candidates: dict[str, Any] = {"present": layer}
    chosen = {options.form: _spread(len(options.ranks)) for _, options in menu}
    for form, options in menu:
        for index in chosen[options.form]:
            candidates[f"{options.form} {index}"] = form.shaped(layer, options.ranks[index])
    weight = layer.weight
    times: Mapping[str, Timing] = layer_latency(
        candidates, trace, dtype=weight.dtype, device=weight.device, seconds=seconds
    )
    forms = {}
    for _, options in menu:
        indices = chosen[options.form]
        medians = [times[f"{options.form} {index}"].median for index in indices]
        forms[options.form] = (options.parameters[indices].double(), torch.tensor(medians, dtype=torch.float64))
    return LayerTimes(times["present"].median, forms)


def _spread(count: int) -> list[int]:
    return sorted({round(step * (count - 1) / (POINTS - 1)) for step in range(POINTS)}) if count else []


def interpolated(x: Tensor, nodes: Tensor, values: Tensor) -> Tensor:
    """Return the broken line through ``(nodes, values)`` at ``x``, constant beyond its ends.

    Example:
        >>> nodes, values = torch.tensor([0.0, 10.0]), torch.tensor([1.0, 3.0])
        >>> interpolated(torch.tensor([-5.0, 5.0, 20.0]), nodes, values).tolist()
        [1.0, 2.0, 3.0]
    """
    if len(nodes) == 1:
        return values.expand(len(x)).clone()
    right = torch.searchsorted(nodes, x).clamp(1, len(nodes) - 1)
    x0, x1 = nodes[right - 1], nodes[right]
    part = ((x - x0) / (x1 - x0)).clamp(0, 1)
    return values[right - 1] + part * (values[right] - values[right - 1])
