"""How much the outputs of the whole model change when one layer is truncated: measured, layer by layer."""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, is_dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from dynarank.compress.forms.base import AbstractForm, Options, Rank
from dynarank.compress.timing import interpolated
from dynarank.factorize.sites import carry_hooks
from dynarank.linalg import widen
from dynarank.measure import Forward, Moments, copied, unfused

Divergence = Callable[[Any, Any], Tensor]  # outputs before, outputs now -> a number that grows with the damage

PROBES = (0.01, 0.05, 0.2, 0.5)  # relative squared errors of a layer's outputs near which its effect is measured
SMALLEST = 1e-12  # an error that counts as none


def relative_error(before: Any, now: Any) -> Tensor:
    """Return ``||now - before||^2 / ||before||^2`` over all floating-point tensors of the outputs.

    Raises:
        ValueError: The outputs before hold no finite number, or those now are of another structure.

    Example:
        >>> relative_error(torch.tensor([3.0, 4.0]), torch.tensor([3.0, 3.0])).item()
        0.03999999910593033
    """
    pairs = list(zip(_floating(before), _floating(now), strict=True))
    if not any(bool(b.isfinite().any()) for b, _ in pairs):
        raise ValueError(
            f"relative_error: the outputs ({type(before).__name__}) hold no finite floating-point number. Check the "
            "calibration data, or pass forward, divergence or measured_sensitivity=False."
        )
    change = size = torch.zeros(())
    for b, n in pairs:
        kept = b.isfinite()  # a logit of -inf is masked
        change = change + (n - b)[kept].square().sum().cpu()  # a model may be on several devices
        size = size + b[kept].square().sum().cpu()
    return change / size.clamp_min(torch.finfo(torch.float32).tiny)


def kl_divergence(before: Any, now: Any) -> Tensor:
    """Return the mean Kullback-Leibler divergence of the class probabilities, for models that return logits.

    Shape:
        Logits ``(*, classes)``.

    Example:
        >>> kl_divergence(torch.zeros(2, 3), torch.zeros(2, 3)).item()
        0.0
    """
    before, now = (widen(logits).reshape(-1, logits.shape[-1]).log_softmax(-1) for logits in (before, now))
    return nn.functional.kl_div(now, before, log_target=True, reduction="batchmean")


def _floating(outputs: Any) -> list[Tensor]:
    """Return the floating-point tensors of outputs in at least float32; those of unregistered classes too."""
    found = []
    for leaf in tree_leaves(outputs):
        if isinstance(leaf, Tensor):
            found += [widen(leaf)] if leaf.is_floating_point() else []
        elif isinstance(leaf, Mapping):
            found += _floating(dict(leaf))
        elif is_dataclass(leaf) and not isinstance(leaf, type):
            found += _floating(vars(leaf))
    return found


@dataclass(frozen=True)
class Damage:
    """How much the model's outputs diverge when one layer's outputs are wrong: a broken line through measured points.

    Args:
        errors: Relative squared errors of the layer's outputs, rising from 0.
        divergences: What they did to the outputs of the model, never falling.

    Shape:
        Both ``(k,)`` float64, with ``(0, 0)`` first.

    Example:
        >>> damage = Damage(torch.tensor([0.0, 0.1, 1.0]), torch.tensor([0.0, 0.5, 1.0]))
        >>> damage.of(torch.tensor([0.05, 0.1, 0.55])).tolist()
        [0.25, 0.5, 0.75]
    """

    errors: Tensor
    divergences: Tensor

    def of(self, errors: Tensor) -> Tensor:
        """Return the divergence expected at these errors, ``(k,)``."""
        return interpolated(errors, self.errors, self.divergences)


def unmeasured() -> Damage:
    """Return the damage that is as large as the error: all layers matter alike."""
    line = torch.tensor([0.0, 1.0], dtype=torch.float64)
    return Damage(line, line)


@torch.no_grad()
def measure_damage(
    model: nn.Module,
    layer: nn.Module,
    menu: Sequence[tuple[AbstractForm, Options]],
    moments: Moments | None,
    probes: Sequence[tuple[Any, Any]],
    *,
    forward: Forward,
    divergence: Divergence,
) -> Damage:
    """Return what truncating a layer does to the outputs of the model.

    The layer is replaced by options whose errors are near 0.01, 0.05, 0.2 and 0.5, one after the other, and put back.

    Args:
        model: The model, in the mode it is to be looked at.
        layer: One of its layers.
        menu: The forms of the layer with their options.
        moments: Moments of its inputs.
        probes: Batches with the outputs of the model as it is, unfused.
        forward: How a batch goes through the model.
        divergence: What change of the outputs counts.

    Raises:
        ValueError: The outputs diverge by NaN or infinity.
    """
    points = {0.0: 0.0}
    for form, rank, error in _near(menu):
        # Unfused, as the outputs before: the fast paths of torch's transformers treat padding otherwise.
        with swapped(model, layer, form.build(layer, moments, rank)), unfused():
            points[error] = sum(
                _divergence(divergence, before, forward(model, copied(batch))) for batch, before in probes
            )
    if len(points) == 1:
        return unmeasured()
    errors = torch.tensor(sorted(points), dtype=torch.float64)
    divergences = torch.tensor([points[error] for error in errors.tolist()], dtype=torch.float64) / len(probes)
    slope = divergences[-1] / errors[-1]  # beyond the last point: no cheaper than in proportion
    errors, divergences = torch.cat([errors, errors.new_tensor([1.0])]), torch.cat([divergences, slope[None]])
    return Damage(errors, divergences.cummax(0).values)


def _divergence(divergence: Divergence, before: Any, now: Any) -> float:
    found = float(divergence(before, now))
    if not math.isfinite(found):
        raise ValueError(
            f"the divergence of the model's outputs must be finite, got {found}. Check the calibration data, or pass "
            "another divergence or measured_sensitivity=False."
        )
    return found


def _near(menu: Sequence[tuple[AbstractForm, Options]]) -> list[tuple[AbstractForm, Rank, float]]:
    """Return for each probe the option whose error is nearest to it on a logarithmic scale, each once."""
    found: dict[float, tuple[AbstractForm, Rank, float]] = {}
    for probe in PROBES:
        offers = []
        for form, options in menu:
            distances = (options.errors.clamp_min(SMALLEST) / probe).log().abs()
            index = int(distances.argmin())
            error = float(options.errors[index].clamp(SMALLEST, 1 - SMALLEST))
            offers.append((float(distances[index]), form, options.ranks[index], error))
        if offers:
            _, form, rank, error = min(offers, key=lambda offer: offer[0])
            found[error] = (form, rank, error)
    return list(found.values())


@contextmanager
def swapped(model: nn.Module, old: nn.Module, new: nn.Module) -> Iterator[None]:
    """Put ``new`` in the place of ``old`` for a while, wherever it is registered, with its hooks."""
    carry_hooks(old, new)
    places = [(parent, name) for parent in model.modules() for name, child in parent._modules.items() if child is old]
    for parent, name in places:
        parent._modules[name] = new
    try:
        yield
    finally:
        for parent, name in places:
            parent._modules[name] = old
