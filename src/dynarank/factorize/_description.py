"""One layer as plain data, without weights, and an empty layer built from it."""

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from dynarank._discovery import discover
from dynarank.errors import unknown_name
from dynarank.factors import FactorPair, LowRankFactors
from dynarank.layers._factored import AbstractFactoredLayer
from dynarank.layers._tucker import AbstractTuckerLayer
from dynarank.layers.base import AbstractLowRankLayer

CHAIN = "chain"  # the kind of an nn.Sequential of layers that stands for one dense layer


def describe(layer: Any) -> dict[str, Any]:
    """Return what a low-rank layer, or a dense one with a low-rank twin, is.

    Raises:
        TypeError: There is no kind for its class.

    Example:
        >>> describe(nn.Linear(3, 2))
        {'kind': 'linear', 'options': {'in_features': 3, 'out_features': 2}, 'bias': True, 'dtype': 'float32',
         'form': 'dense'}
    """
    kind = next((kind for kind, twin in _twins().items() if type(layer) in (twin, twin.dense_type)), None)
    if kind is None:
        raise TypeError(f"structure: {type(layer).__name__} is no kind of layer. Available: {', '.join(_twins())}.")
    entry = {
        "kind": kind,
        **interface(kind, layer),
        "dtype": str(next(layer.parameters()).dtype).removeprefix("torch."),
    }
    if isinstance(layer, AbstractTuckerLayer):
        stored, ranks = list(layer.core.shape), list(layer.all_ranks)
        return entry | {"form": "tucker", "ranks": ranks, "stored": stored, "rank_multiple": layer.rank_multiple}
    if not isinstance(layer, AbstractLowRankLayer):
        return entry | {"form": "dense"}
    stored = [layer.capacity] * 2 if layer.S is None else list(layer.S.shape)
    return entry | {"form": layer.form, "rank": layer.rank, "stored": stored, "rank_multiple": layer.rank_multiple}


def interface(kind: str, layer: Any) -> dict[str, Any]:
    """Return what a dense layer and its low-rank twin of a kind have in common."""
    options = twin_of(kind).dense_options(layer)
    lists = {key: list(value) if isinstance(value, tuple) else value for key, value in options.items()}
    return {"options": lists} | ({"bias": layer.bias is not None} if "bias" in layer._parameters else {})


def arguments(entry: Mapping[str, Any]) -> dict[str, Any]:
    """Return what a described layer was built with: its options, and whether it has a bias where it could have one."""
    return entry["options"] | {key: entry[key] for key in ("bias",) if key in entry}


def demands(entry: Mapping[str, Any]) -> dict[str, Any]:
    """Return what the dense layer that a described layer or chain stands for must be.

    Example:
        >>> chain = {"0": describe(nn.Conv2d(3, 2, 1, bias=False)), "1": describe(nn.Conv2d(2, 8, 3, stride=2))}
        >>> demands({"kind": "chain", "layers": chain})
        {'type': 'Conv2d', 'inputs': 3, 'outputs': 8, 'window': [3, 3], 'stride': [2, 2], 'bias': True}
    """
    if entry["kind"] != CHAIN:
        return {"type": twin_of(entry["kind"]).dense_type.__name__, **arguments(entry)}
    parts = list(entry["layers"].values())
    options = [part["options"] for part in parts]
    kernels = [zip(o.get("kernel_size", ()), o.get("dilation", ()), strict=True) for o in options]
    return {
        "type": twin_of(parts[-1]["kind"]).dense_type.__name__,
        "inputs": options[0].get("in_channels", options[0].get("in_features")),
        "outputs": options[-1].get("out_channels", options[-1].get("out_features")),
        "window": [1 + sum(d * (k - 1) for k, d in column) for column in zip(*kernels, strict=True)],
        "stride": [math.prod(column) for column in zip(*(o.get("stride", ()) for o in options), strict=True)],
        "bias": parts[-1]["bias"],
    }


@torch.no_grad()
def empty(entry: Mapping[str, Any]) -> Any:
    """Return a layer as described, with weights of no value, on the meta device."""
    twin = twin_of(entry["kind"])
    options = {**arguments(entry), "device": "meta", "dtype": getattr(torch, entry["dtype"])}
    if entry["form"] == "dense":
        return twin.dense_type(**options)
    if entry["form"] == "tucker":
        layer = twin(**options, ranks=entry["ranks"], rank_multiple=entry["rank_multiple"])
        layer.set_capacities(entry["stored"])
        return layer
    left, right = entry["stored"]
    layer = twin(**options, rank=min(left, right))
    layer.rank_multiple = entry["rank_multiple"]
    m, n = layer.matrix_shape
    if entry["form"] == "core":
        layer.set_factors(LowRankFactors(_meta(m, left), _meta(left, right), _meta(n, right)))
    else:
        layer.set_factors(FactorPair(_meta(entry["rank"], m), _meta(entry["rank"], n)), resize=False)
    return layer


def is_chain(module: nn.Module) -> bool:
    """Whether a module may stand for one dense layer: linear maps in a row, with a bias at most at the end."""
    linear = [twin for twin in _twins().values() if twin.dense_type is not nn.Embedding]
    known = {cls for twin in linear for cls in (twin, twin.dense_type)}
    parts: list[Any] = list(module.children()) if type(module) is nn.Sequential else []
    return (
        len(parts) > 1
        and all(type(part) in known for part in parts)
        and any(isinstance(part, AbstractFactoredLayer) for part in parts)
        and all(part.bias is None for part in parts[:-1])
    )


def twin_of(kind: str) -> Any:
    """Return the class of low-rank layers of a kind.

    Raises:
        ValueError: There is none.
    """
    if kind not in _twins():
        raise unknown_name("kind of layer", kind, _twins())
    return _twins()[kind]


def _twins() -> dict[str, Any]:
    return discover("dynarank.layers", AbstractFactoredLayer)


def _meta(*shape: int) -> Tensor:
    return torch.empty(shape, device="meta")
