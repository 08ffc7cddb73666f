"""What must be as before where a model is left as it was, and small networks to compress."""

from collections.abc import Callable
from itertools import pairwise
from typing import Any

import pytest
import torch
from torch import Tensor, nn


@pytest.fixture
def state_of() -> Callable[[nn.Module], Any]:
    """Everything that a refusal must leave: modules, tensors and their values, flags, hooks, the generator."""

    def state_of(model: nn.Module) -> Any:
        tensors = dict(model.named_parameters()) | dict(model.named_buffers())
        modules = dict(model.named_modules(remove_duplicate=False))
        return (
            {name: id(module) for name, module in modules.items()},
            {name: (id(t), t.requires_grad, t.grad is None) for name, t in tensors.items()},
            {name: t.tolist() for name, t in tensors.items() if not t.is_meta},
            {name: (module.training, getattr(module, "momentum", None)) for name, module in modules.items()},
            {name: (list(m._forward_hooks), list(m._forward_pre_hooks)) for name, m in modules.items()},
            torch.get_rng_state().tolist(),
            torch.is_grad_enabled(),
        )

    return state_of


@pytest.fixture
def mlp() -> Callable[..., nn.Sequential]:
    """A float64 network of linear layers with ReLU between; the last is the head."""

    def mlp(*widths: int, bias: bool = True, **kind: Any) -> nn.Sequential:
        kind = {"dtype": torch.float64} | kind
        layers: list[nn.Module] = []
        for n, m in pairwise(widths):
            layers += [nn.Linear(n, m, bias, **kind), nn.ReLU()]
        return nn.Sequential(*layers[:-1])

    return mlp


@pytest.fixture
def batches() -> Callable[..., list[Tensor]]:
    """Batches of inputs whose features are of very different size and not centred."""

    def batches(features: int, *, count: int = 2, rows: int = 24, **kind: Any) -> list[Tensor]:
        scale = torch.logspace(0, -2, features, dtype=torch.float64)
        draws = (torch.randn(rows, features, dtype=torch.float64) * scale + scale for _ in range(count))
        return [draw.to(**kind) for draw in draws]

    return batches
