"""A layer so small that its arithmetic counts for little costs at most twice what the dense one does."""

import time
from statistics import median
from typing import Any

import pytest
import torch
from torch import nn

from dynarank.layers.linear import LowRankLinear


def microseconds(layers: dict[str, nn.Module], x: torch.Tensor, *, rounds: int = 60, calls: int = 20) -> dict[str, Any]:
    """Return the median time of a forward and a backward pass of each layer, on the clock of the process, in turns."""
    times: dict[str, list[float]] = {name: [] for name in layers}
    for turn in range(rounds):
        for name in list(layers)[:: 1 if turn % 2 else -1]:
            begin = time.process_time_ns()
            for _ in range(calls):
                layers[name](x).backward(x)
                layers[name].zero_grad()
            times[name].append((time.process_time_ns() - begin) / calls / 1e3)
    return {name: median(found) for name, found in times.items()}


@pytest.mark.slow
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("rank", [4, 8, 15, 16])
@pytest.mark.parametrize("shape", [(32, 64), (4, 8, 64)])
def test_a_tiny_linear_layer(shape: tuple[int, ...], rank: int, bias: bool):
    layers: dict[str, nn.Module] = {
        "dense": nn.Linear(64, 64, bias),
        "dense again": nn.Linear(64, 64, bias),
        "low rank": LowRankLinear(64, 64, bias, rank=rank),
        "spare rows": LowRankLinear(64, 64, bias, rank=rank, rank_multiple=16),
    }
    times = microseconds(layers, torch.randn(shape, requires_grad=True))
    ratios = {name: round(spent / times["dense"], 2) for name, spent in times.items()}
    print(shape, f"rank {rank}", "with bias" if bias else "without", ratios)
    assert ratios["low rank"] <= 2 and ratios["spare rows"] <= 2
