"""What other rooms need to replace layers as ``factorize_`` does: which ones, and putting new ones in their place."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from torch import nn
from torch.nn.parallel import DistributedDataParallel

from dynarank.factorize._guard import watch
from dynarank.factorize._heads import Heads, find_heads
from dynarank.factorize._plan import check_known, reason_to_leave
from dynarank.factorize._replace import attention_projections, carry_attributes, carry_hooks, replace_
from dynarank.factorize._select import Selection, Selector
from dynarank.factorize._sites import Site, find_sites, multiplying
from dynarank.layers._tucker import AbstractTuckerLayer

__all__ = [
    "TUCKER",
    "ChosenSite",
    "Selector",
    "Site",
    "attention_projections",
    "carry_attributes",
    "carry_hooks",
    "choose_sites",
    "put_in_place",
    "refuse_wrapped",
]

LOOKED_UP = "an embedding: its rows are looked up, not multiplied"
TUCKER = "a convolution in Tucker form; merge_ it to choose another form"
ITSELF = "it is the model itself, which cannot be replaced in place; wrap it in nn.Sequential"


@dataclass(frozen=True)
class ChosenSite:
    """A layer with a weight matrix, and why it is to be left alone.

    Args:
        site: The layer.
        reason: Why it stays as it is; empty where it may be replaced.
    """

    site: Site
    reason: str


def choose_sites(
    model: nn.Module,
    *,
    target_modules: Selector = None,
    exclude_modules: Selector = None,
    include_head: bool = False,
    example_inputs: Any = None,
) -> list[ChosenSite]:
    """Return every layer that owns a weight matrix, with why it is to be left alone; arguments as in ``factorize_``.

    Low-rank layers are among them; what is named or left out holds for them as for the others. Embeddings cannot be
    named: only ``factorize_`` replaces them. Convolutions in Tucker form stay as they are.

    Raises:
        ValueError: A name matches nothing.
    """
    target = Selection(target_modules, argument="target_modules")
    exclude = Selection(exclude_modules, argument="exclude_modules")
    found = find_sites(model)
    sites = [replace(site, twin=None, obstacle=LOOKED_UP) if site.looks_up else site for site in found]
    check_known(model, sites, target, exclude)
    heads = {} if include_head else find_heads(model, multiplying(sites), example_inputs)
    return [ChosenSite(site, _reason(site, heads, target, exclude)) for site in sites]


def _reason(site: Site, heads: Heads, target: Selection, exclude: Selection) -> str:
    if site.name == "":
        return ITSELF
    tensor = isinstance(site.module, AbstractTuckerLayer)
    return reason_to_leave(site, heads, target, exclude) or (TUCKER if tensor else "")


def refuse_wrapped(model: nn.Module, verb: str) -> None:
    """Refuse a model that is wrapped for data-parallel training.

    Raises:
        RuntimeError: There is a ``DistributedDataParallel`` in it.
    """
    if any(isinstance(module, DistributedDataParallel) for module in model.modules()):
        raise RuntimeError(f"{verb} found DistributedDataParallel, which holds the old parameters. Wrap after {verb}.")


def put_in_place(model: nn.Module, new: Mapping[nn.Module, nn.Module], *, verb: str) -> None:
    """Put ``new[old]`` wherever ``old`` is registered, with its hooks; optimizers that hold old weights will say so.

    Args:
        model: The model, changed in place.
        new: New modules by the old ones.
        verb: Name of the function that does it, for messages.
    """
    names = {module: name for name, module in model.named_modules()}
    old = [
        (parameter, f"{key} of {names[module]!r}")
        for module, successor in new.items()
        for key, parameter in module.named_parameters()
        if not any(parameter is kept for kept in successor.parameters())
    ]
    replace_(model, dict(new))
    watch(model, old, verb=verb)
