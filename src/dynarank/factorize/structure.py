"""The low-rank structure of a model as plain data, without weights, and a dense model brought into it."""

from collections import OrderedDict
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import nn

from dynarank.factorize._description import CHAIN, arguments, demands, describe, empty, interface, is_chain, twin_of
from dynarank.factorize._replace import carry_attributes
from dynarank.factorize._sites import Site, find_sites
from dynarank.factorize.sites import put_in_place, refuse_wrapped
from dynarank.layers._factored import AbstractFactoredLayer

__all__ = ["CHAIN", "arguments", "describe", "plan_structure", "restructure_", "structure", "twin_of"]


def structure(model: nn.Module) -> dict[str, Any]:
    """Return, for every low-rank layer of ``model``, what it is: plain data that JSON can hold, without weights.

    An entry says under which names the layer is registered, its kind and options, whether it has a bias, its dtype, its
    form, its rank and the numbers of directions ``stored`` on the side of the outputs and of the inputs; with spare
    rows they are more than the rank. An ``nn.Sequential`` that stands for one dense layer, such as a 1x1 convolution
    and a low-rank one, is one entry of kind ``"chain"`` with its layers.

    Raises:
        TypeError: A low-rank layer is of a class that has no kind.

    Example:
        >>> from dynarank.layers.linear import LowRankLinear
        >>> structure(nn.Sequential(LowRankLinear(8, 6, rank=2), nn.ReLU()))["0"]
        {'names': ['0'], 'kind': 'linear', 'options': {'in_features': 8, 'out_features': 6}, 'bias': True,
         'dtype': 'float32', 'form': 'pair', 'rank': 2, 'stored': [2, 2], 'rank_multiple': 1}
    """
    names: dict[nn.Module, list[str]] = {}
    for name, module in model.named_modules(remove_duplicate=False):
        names.setdefault(module, []).append(name)
    found: dict[str, Any] = {}
    covered: set[nn.Module] = set()
    for module, own in names.items():  # parents before their children
        if is_chain(module) and "" not in own:
            parts = {key: describe(part) for key, part in module.named_children()}
            found[own[0]] = {"names": own, "kind": CHAIN, "layers": parts}
            covered |= {*module.children()}
        elif isinstance(module, AbstractFactoredLayer) and module not in covered:
            found[own[0]] = {"names": own, **describe(module)}
    return found


def restructure_(model: nn.Module, structure: Mapping[str, Any]) -> None:
    """Give a dense model a low-rank structure, in place: its layers become empty low-rank ones, ready to be loaded.

    Layers that already are as the structure says stay. New ones have factors of zeros, on the device of the layer whose
    place they take; biases and hooks are kept.

    Args:
        model: The dense architecture, or one that has the structure already; weights do not matter. Of a model on the
            meta device the new layers are there too.
        structure: What `structure` returned for a model of this architecture.

    Raises:
        ValueError: The model does not fit: a layer is missing, has other options or cannot be replaced. The model is
            unchanged.
        RuntimeError: The model is wrapped for distributed training.

    Example:
        >>> from dynarank.layers.linear import LowRankLinear
        >>> compressed = nn.Sequential(LowRankLinear(8, 6, rank=2), nn.ReLU())
        >>> model = nn.Sequential(nn.Linear(8, 6), nn.ReLU())
        >>> restructure_(model, structure(compressed))
        >>> model.load_state_dict(compressed.state_dict()), model[0]
        (<All keys matched successfully>, LowRankLinear(in_features=8, out_features=6, bias=True, rank=2))
    """
    put_in_place(model, plan_structure(model, structure), verb="restructure_")


@torch.no_grad()
def plan_structure(model: nn.Module, structure: Mapping[str, Any]) -> dict[nn.Module, nn.Module]:
    """Return the new modules by the old ones that `restructure_` would put in place; the model is left as it is."""
    refuse_wrapped(model, "restructure_")
    sites = {site.name: site for site in find_sites(model)}
    try:
        wanted = dict(_opened(structure, model))
        missing = sorted(wanted.keys() - sites.keys())
        if missing:
            raise _misfit(f"{len(missing)} of {len(wanted)} layers are not in the model: {_some(missing)}")
        extra = [name for name, site in sites.items() if site.low_rank and name not in wanted]
        if extra:
            raise _misfit(f"the model has low-rank layers of its own: {_some(extra)}")
        planned = {sites[name].module: _planned(sites[name], entry) for name, entry in wanted.items()}
    except (AttributeError, KeyError, TypeError) as cause:
        raise ValueError(f"the structure is malformed: {type(cause).__name__}: {cause}.") from cause
    return {old: new for old, new in planned.items() if new is not None}


def _opened(structure: Mapping[str, Any], model: nn.Module) -> Iterator[tuple[str, Any]]:
    """Yield the entries by name; of a chain that the model itself has, the low-rank layers inside."""
    sequences = {name for name, module in model.named_modules() if isinstance(module, nn.Sequential)}
    for name, entry in structure.items():
        if entry["kind"] != CHAIN or name not in sequences:
            yield name, entry
            continue
        for key, part in entry["layers"].items():
            if part["form"] != "dense":
                yield f"{name}.{key}", {"names": [f"{prefix}.{key}" for prefix in entry["names"]], **part}


def _planned(site: Site, entry: Mapping[str, Any]) -> nn.Module | None:
    """Return the empty module for a site, or None where the layer is already what the entry says."""
    old, names = site.module, list(site.names)
    if site.low_rank and {"names": names, **describe(old)} == entry:
        return None
    if site.obstacle or "" in names:
        raise _misfit(f"{site.name!r} cannot be replaced: {site.obstacle or 'it is the model itself'}")
    chain = entry["kind"] == CHAIN
    present = {"names": names, "kind": site.kind, **interface(site.kind, old)}
    if chain:
        present = {"names": names, "kind": CHAIN, "layers": {"": present}}
    wanted, found = ({"names": each["names"], **demands(each)} for each in (entry, present))
    for key, value in wanted.items():
        if found.get(key) != value:
            raise _misfit(f"{site.name!r} has {key} {value} in the structure and {found.get(key)} in the model")
    if not chain:
        return _settled(empty(entry), old)
    return _settled(nn.Sequential(OrderedDict((key, empty(part)) for key, part in entry["layers"].items())), old)


def _settled(new: Any, old: Any) -> nn.Module:
    """Return ``new`` as the successor of ``old``: on its device, with its bias, its mode and what users set on it."""
    weight, last, bias = next(old.parameters()), [new, *new.children()][-1], getattr(old, "bias", None)
    if not weight.is_meta:
        new.to_empty(device=weight.device)
    if weight.dim() == 4 and weight.is_contiguous(memory_format=torch.channels_last):
        new.to(memory_format=torch.channels_last)  # the plain part of a chain
    for tensor in (*new.parameters(), *new.buffers()):
        tensor.zero_()
    new.requires_grad_(weight.requires_grad)
    if bias is not None and bias.dtype == last.bias.dtype:
        last.bias = bias
    if isinstance(new, AbstractFactoredLayer):
        carry_attributes(old, new, fresh=new if isinstance(old, AbstractFactoredLayer) else new.dense_twin("meta"))
    return new.train(old.training)


def _misfit(fault: str) -> ValueError:
    return ValueError(
        f"the structure is of another architecture: {fault}. Pass the model it was taken from, before compression."
    )


def _some(names: Sequence[str]) -> str:
    return ", ".join(repr(name) for name in names[:5]) + (", ..." if len(names) > 5 else "")
