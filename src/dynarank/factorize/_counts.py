"""How many numbers a model holds, as deployed and as trained, and its state dict as a dense model would have it."""

from collections import OrderedDict
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from dynarank.layers._factored import AbstractFactoredLayer, factored_layers


def deployed_parameters(model: nn.Module) -> int:
    """Return how many numbers the compacted state dict of ``model`` holds.

    Every parameter and every persistent buffer counts, shared ones once. A low-rank layer counts as two factors at
    its rank, without spare rows, or as a dense weight where that is smaller or equal.

    Example:
        >>> from dynarank.layers.linear import LowRankLinear
        >>> deployed_parameters(LowRankLinear(100, 50, rank=3, rank_multiple=8))
        500
    """
    matrices = sum(layer.deployed_parameters() for layer in factored_layers(model).values())
    others = {id(tensor): tensor.numel() for module in model.modules() for tensor in _stored(module)}
    return matrices + sum(others.values())


def _stored(module: nn.Module) -> Iterator[Tensor]:
    """Yield the tensors that ``module`` itself brings into a state dict, the factors of a low-rank layer left out."""
    buffers = {k: b for k, b in module._buffers.items() if k not in module._non_persistent_buffers_set}
    skip = (*module.factor_names, *module.basis_names) if isinstance(module, AbstractFactoredLayer) else ()
    for name, tensor in (module._parameters | buffers).items():
        if tensor is not None and name not in skip and not nn.parameter.is_lazy(tensor):
            yield tensor


def trainable_parameters(model: nn.Module) -> int:
    """Return how many numbers an optimizer would train: parameters that require a gradient, shared ones once.

    Spare rows of low-rank layers count; `deployed_parameters` leaves them out.

    Example:
        >>> from dynarank.layers.linear import LowRankLinear
        >>> trainable_parameters(LowRankLinear(100, 50, rank=3, rank_multiple=8))
        1250
    """
    return sum(p.numel() for p in model.parameters() if p.requires_grad and not nn.parameter.is_lazy(p))


@torch.no_grad()
def dense_state_dict(model: nn.Module) -> dict[str, Any]:
    """Return the state dict of the dense model: the same keys and shapes, with every weight multiplied out.

    It loads into the model as it was before ``factorize_``. Weights are multiplied in at least float32 and then cast.

    Example:
        >>> from dynarank.layers.linear import LowRankLinear
        >>> state = dense_state_dict(nn.Sequential(LowRankLinear(4, 3, rank=1), nn.ReLU()))
        >>> {name: tuple(tensor.shape) for name, tensor in state.items()}
        {'0.weight': (3, 4), '0.bias': (3,)}
    """
    state: OrderedDict[str, Any] = model.state_dict()  # type: ignore[assignment]
    weights: dict[int, Tensor] = {}
    owners: dict[str, AbstractFactoredLayer] = {
        f"{name}." if name else "": module
        for name, module in model.named_modules(remove_duplicate=False)
        if isinstance(module, AbstractFactoredLayer)
    }
    dense: OrderedDict[str, Any] = OrderedDict()
    for key, tensor in state.items():
        prefix, _, last = key.rpartition(".")
        layer = owners.get(prefix + "." if prefix else "")
        if layer is None or last not in (*layer.factor_names, *layer.basis_names):
            dense[key] = tensor
        elif (name := prefix + ".weight" if prefix else "weight") not in dense:  # the first factor: its place
            if id(layer) not in weights:
                weights[id(layer)] = layer.to_dense().weight.detach()  # type: ignore[union-attr, operator]
            dense[name] = weights[id(layer)]
    dense._metadata = getattr(state, "_metadata", None)  # type: ignore[attr-defined]
    return dense
