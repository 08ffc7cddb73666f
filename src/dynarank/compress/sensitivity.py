"""How much the outputs of the whole model change when one layer is truncated: measured, layer by layer."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from dynarank.compress.forms.base import AbstractForm, Options
from dynarank.measure import Forward, Moments

Divergence = Callable[[Any, Any], Tensor]  # outputs before, outputs now -> a number that grows with the damage

PROBES = (0.05, 0.2)  # relative squared errors of a layer's outputs near which its effect is measured


def relative_error(before: Any, now: Any) -> Tensor:
    """Return ``||now - before||^2 / ||before||^2`` over all floating-point tensors of the outputs.

    Example:
        >>> relative_error(torch.tensor([3.0, 4.0]), torch.tensor([3.0, 3.0])).item()
        0.03999999910593033
    """
    pairs = [(b, n) for b, n in zip(tree_leaves(before), tree_leaves(now), strict=True) if _is_floating(b)]
    change = sum(((n.float() - b.float()).square().sum() for b, n in pairs), torch.zeros(()))
    size = sum((b.float().square().sum() for b, _ in pairs), torch.zeros(()))
    return change / size.clamp_min(torch.finfo(torch.float32).tiny)


def kl_divergence(before: Any, now: Any) -> Tensor:
    """Return the mean Kullback-Leibler divergence of the class probabilities, for models that return logits.

    Shape:
        Logits ``(*, classes)``.

    Example:
        >>> kl_divergence(torch.zeros(2, 3), torch.zeros(2, 3)).item()
        0.0
    """
    before, now = (logits.float().flatten(0, -2).log_softmax(-1) for logits in (before, now))
    return nn.functional.kl_div(now, before, log_target=True, reduction="batchmean")


def _is_floating(leaf: Any) -> bool:
    return isinstance(leaf, Tensor) and leaf.is_floating_point()


@torch.no_grad()
def sensitivity(
    model: nn.Module,
    layer: nn.Module,
    menu: Sequence[tuple[AbstractForm, Options]],
    moments: Moments | None,
    probes: Sequence[tuple[Any, Any]],
    *,
    forward: Forward,
    divergence: Divergence,
) -> float:
    """Return how much the model's outputs diverge per unit of a layer's relative output error.

    The layer is replaced by options with errors near 0.05 and 0.2, one after the other, and put back.

    Args:
        model: The model, in the mode it is to be looked at.
        layer: One of its layers.
        menu: The forms of the layer with their options.
        moments: Moments of its inputs.
        probes: Batches with the outputs of the model as it is.
        forward: How a batch goes through the model.
        divergence: What change of the outputs counts.
    """
    ratios = []
    for form, index, error in _near(menu):
        options = next(options for one, options in menu if one is form)
        with swapped(model, layer, form.build(layer, moments, options.ranks[index])):
            change = sum(float(divergence(before, forward(model, batch))) for batch, before in probes) / len(probes)
        ratios.append(change / error)
    return sum(ratios) / len(ratios) if ratios else 1.0


def _near(menu: Sequence[tuple[AbstractForm, Options]]) -> list[tuple[AbstractForm, int, float]]:
    """Return for each probe the option whose error is nearest to it on a logarithmic scale, each once."""
    found: dict[tuple[str, int], tuple[AbstractForm, int, float]] = {}
    for probe in PROBES:
        offers = [
            (abs(float(torch.log(options.errors[i].clamp_min(1e-12) / probe))), form, options, i)
            for form, options in menu
            if len(options.ranks)
            for i in [int((options.errors.clamp_min(1e-12) / probe).log().abs().argmin())]
        ]
        if offers:
            _, form, options, index = min(offers, key=lambda offer: offer[0])
            found[options.form, index] = (form, index, max(float(options.errors[index]), 1e-12))
    return list(found.values())


@contextmanager
def swapped(model: nn.Module, old: nn.Module, new: nn.Module) -> Iterator[None]:
    """Put ``new`` in the place of ``old`` for a while, wherever it is registered."""
    places = [(parent, name) for parent in model.modules() for name, child in parent._modules.items() if child is old]
    for parent, name in places:
        parent._modules[name] = new
    try:
        yield
    finally:
        for parent, name in places:
            parent._modules[name] = old
