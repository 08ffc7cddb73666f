"""Whether the optimizer drives all that the model trains."""

import logging
from collections.abc import Collection, Iterable, Mapping
from typing import Any

from torch import Tensor, nn

from dynarank.layers._factored import AbstractFactoredLayer, factored_layers
from dynarank.optim._layer_state import stored

logger = logging.getLogger("dynarank")


def check_ownership(
    model: nn.Module,
    layers: Mapping[str, AbstractFactoredLayer],
    groups: Iterable[Mapping[str, Any]],
    *,
    known: Collection[str] = (),
) -> list[str]:
    """Return the trainable parameters that are in no group, and log a warning about those that were not ``known``.

    Raises:
        RuntimeError: A low-rank layer came into the model, or left it, after the optimizer was built.
    """
    present = factored_layers(model)
    ours, theirs = {id(layer) for layer in layers.values()}, {id(layer) for layer in present.values()}
    if added := [name for name, layer in present.items() if id(layer) not in ours]:
        raise RuntimeError(
            f"the low-rank layers {_listed(added)} came into the model after the optimizer was built, so nothing "
            "trains them. Call optimizer.add_param_group({'params': layer.parameters()}) for each."
        )
    if gone := [name for name, layer in layers.items() if id(layer) not in theirs]:
        raise RuntimeError(
            f"the optimizer drives the low-rank layers {_listed(gone)}, which are no longer in the model. "
            "Build the optimizer again."
        )
    held = {id(p) for group in groups for p in group["params"]}
    held |= {id(p) for layer in layers.values() for p in stored(layer)}
    loose = [name for name, p in model.named_parameters() if p.requires_grad and id(p) not in held]
    if new := [name for name in loose if name not in known]:
        logger.warning(
            "%s came into the model after the optimizer was built, and this optimizer does not train them. "
            "Call optimizer.add_param_group({'params': [...]}), unless another optimizer does.",
            _listed(new),
        )
    return loose


def split_group(
    model: nn.Module, layers: Mapping[str, AbstractFactoredLayer], group: Mapping[str, Any]
) -> tuple[dict[str, AbstractFactoredLayer], dict[str, Any]]:
    """Return the new low-rank layers whose factors are in a group of parameters, and the group of all the rest.

    Raises:
        ValueError: A layer is in ``layers`` already or given in part, or there are options for factors alone.
    """
    params = _parameters(group["params"])
    wanted = {id(p) for p in params}
    found = {n: layer for n, layer in factored_layers(model).items() if wanted & {id(p) for p in stored(layer)}}
    if known := layers.keys() & found.keys():
        raise ValueError(f"add_param_group: the factors of {_listed(sorted(known))} are in the optimizer already.")
    adopted = {id(p) for layer in found.values() for p in stored(layer)}
    if not adopted <= wanted:
        raise ValueError(f"add_param_group: give all factors of {_listed(found)}; they move together.")
    rest = {**group, "params": [p for p in params if id(p) not in adopted]}
    if options := [] if rest["params"] else sorted(group.keys() - {"params"}):
        raise ValueError(
            f"add_param_group: factors join the first group and share its options, got {_listed(options)} for "
            f"{_listed(found)} alone. Leave the options out."
        )
    return found, rest


def _parameters(params: Any) -> list[Tensor]:
    if isinstance(params, Tensor):
        return [params]
    if isinstance(params, set):
        raise TypeError("add_param_group needs parameters in a list, got a set: its order changes between runs.")
    return [p[1] if isinstance(p, tuple) else p for p in params]


def _listed(names: Collection[str], most: int = 8) -> str:
    text = ", ".join(list(names)[:most])
    return text if len(names) <= most else f"{text} and {len(names) - most} more"
