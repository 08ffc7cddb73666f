"""What a network costs: numbers stored, multiplications, bytes."""

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from dynarank import cost
from dynarank.factorize import deployed_parameters
from dynarank.layers.base import low_rank_layers


def deployed_at(model: nn.Module, ranks: Mapping[str, int]) -> int:
    """Return the parameters as deployed, were the low-rank layers of these ranks.

    Example:
        >>> from dynarank.layers.linear import LowRankLinear
        >>> model = nn.Sequential(LowRankLinear(100, 50, rank=3))
        >>> deployed_at(model, {"0": 3}), deployed_at(model, {"0": 2})
        (500, 350)
    """
    total = deployed_parameters(model)
    for name, layer in low_rank_layers(model).items():
        shape = layer.matrix_shape
        total += cost.deployed_parameters(*shape, ranks[name]) - cost.deployed_parameters(*shape, layer.rank)
    return total


@torch.no_grad()
def applications(model: nn.Module, sample: Tensor) -> dict[str, tuple[tuple[int, int], int]]:
    """Return for each linear layer or convolution its matrix shape and how often a sample is multiplied by it.

    Args:
        model: A dense network; it is left as it was.
        sample: One input, with the batch dimension.

    Example:
        >>> applications(nn.Sequential(nn.Conv2d(1, 4, 3), nn.Flatten(), nn.Linear(16, 2)), torch.zeros(1, 1, 4, 4))
        {'0': ((4, 9), 4), '2': ((2, 16), 1)}
    """
    found: dict[str, tuple[tuple[int, int], int]] = {}

    def note(name: str, layer: Any, output: Any) -> None:
        weight = layer.weight
        shape = (weight.shape[0], weight[0].numel())
        found[name] = (shape, found.get(name, (shape, 0))[1] + output.numel() // shape[0])

    kinds = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d)
    hooks = [
        layer.register_forward_hook(lambda layer, inputs, output, name=name: note(name, layer, output))
        for name, layer in model.named_modules()
        if isinstance(layer, kinds)
    ]
    try:
        model(sample)
    finally:
        for hook in hooks:
            hook.remove()
    return found


def flops_per_sample(times: Mapping[str, tuple[tuple[int, int], int]], ranks: Mapping[str, int]) -> int:
    """Return multiplications and additions of a forward pass of one sample, as deployed; biases are not counted.

    Args:
        times: What `applications` returned.
        ranks: Ranks of the low-rank layers; all others are dense.

    Example:
        >>> flops_per_sample({"fc": ((50, 100), 1)}, {}), flops_per_sample({"fc": ((50, 100), 1)}, {"fc": 3})
        (10000, 900)
    """
    return sum(
        2 * number * (cost.deployed_parameters(*shape, ranks[name]) if name in ranks else cost.dense_parameters(*shape))
        for name, (shape, number) in times.items()
    )


def bytes_in_training(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, int]:
    """Return the bytes of weights, gradients and optimizer state as they are in memory now, activations left out."""
    state = (value for entry in optimizer.state.values() for value in entry.values())
    gradients = (p.grad for p in model.parameters() if p.grad is not None)
    return {
        "weight_bytes": _bytes((*model.parameters(), *model.buffers())),
        "gradient_bytes": _bytes(gradients),
        "optimizer_bytes": _bytes(value for value in state if isinstance(value, Tensor)),
    }


def _bytes(tensors: Iterable[Tensor]) -> int:
    return sum({id(t): t.numel() * t.element_size() for t in list(tensors)}.values())
