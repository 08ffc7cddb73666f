"""Convolutions with every option, and a small network with everything that has to be put back."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

CONVOLUTIONS: dict[str, tuple[type[nn.Module], tuple[Any, ...], dict[str, Any], tuple[int, ...]]] = {
    "1d": (nn.Conv1d, (4, 3), {}, (3, 4, 9)),
    "1d-same-even": (nn.Conv1d, (4, 4), {"padding": "same", "dilation": 2}, (3, 4, 9)),
    "1d-circular": (nn.Conv1d, (4, 3), {"padding": 2, "padding_mode": "circular"}, (3, 4, 9)),
    "1d-unbatched": (nn.Conv1d, (4, 3), {"stride": 2}, (4, 9)),
    "2d": (nn.Conv2d, (2, 3), {}, (3, 2, 7, 6)),
    "2d-valid": (nn.Conv2d, (2, (3, 2)), {"padding": "valid", "stride": 2}, (3, 2, 7, 6)),
    "2d-uneven": (nn.Conv2d, (2, (3, 2)), {"stride": (2, 1), "padding": (1, 2), "dilation": (1, 3)}, (3, 2, 7, 6)),
    "2d-same": (nn.Conv2d, (2, (3, 2)), {"padding": "same", "dilation": (1, 2)}, (3, 2, 7, 6)),
    "2d-reflect": (nn.Conv2d, (2, 3), {"padding": (1, 2), "padding_mode": "reflect"}, (3, 2, 7, 6)),
    "2d-replicate": (nn.Conv2d, (2, 3), {"padding": 1, "padding_mode": "replicate", "stride": 3}, (3, 2, 7, 6)),
    "2d-circular": (nn.Conv2d, (2, 2), {"padding": "same", "padding_mode": "circular"}, (3, 2, 7, 6)),
    "2d-1x1": (nn.Conv2d, (5, 1), {}, (3, 5, 3, 2)),
    "2d-unbatched": (nn.Conv2d, (2, 3), {"padding": 1}, (2, 7, 6)),
    "2d-one-pixel": (nn.Conv2d, (2, 3), {}, (3, 2, 3, 3)),
    "3d": (nn.Conv3d, (2, 2), {"stride": (1, 1, 2), "padding": (1, 0, 1)}, (2, 2, 4, 3, 5)),
    "3d-replicate": (nn.Conv3d, (2, 2), {"padding": 1, "padding_mode": "replicate"}, (2, 2, 4, 3, 5)),
}


@pytest.fixture(params=CONVOLUTIONS.values(), ids=CONVOLUTIONS.keys())
def convolution(request: pytest.FixtureRequest) -> tuple[Any, Tensor]:
    """A float64 convolution without bias, with more outputs than columns, and an input for it."""
    cls, (channels, kernel), options, shape = request.param
    columns = cls(channels, 1, kernel, **options).weight[0].numel()  # type: ignore[union-attr, operator]
    layer = cls(channels, columns + 2, kernel, bias=False, **options, dtype=torch.float64)
    return layer, torch.randn(shape, dtype=torch.float64)


class Attention(nn.Module):
    """Query, key and value of one input, with dropout, BatchNorm and a part that stays in eval mode."""

    def __init__(self, width: int = 6, heads: int = 2) -> None:
        super().__init__()
        self.heads = heads
        self.norm = nn.BatchNorm1d(width)
        self.query, self.key, self.value = (nn.Linear(width, width) for _ in range(3))
        self.drop = nn.Dropout(0.5)
        self.out = nn.Linear(width, width + 1)
        self.spare = nn.Linear(width, width)
        self.norm.eval()

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm(x.mT).mT
        q, k, v = (f(x).unflatten(-1, (self.heads, -1)).transpose(1, 2) for f in (self.query, self.key, self.value))
        mixed = nn.functional.scaled_dot_product_attention(q, k, v)
        return self.out(self.drop(mixed.transpose(1, 2).flatten(2)))

    def layers(self) -> dict[str, nn.Module]:
        return {name: module for name, module in self.named_modules() if isinstance(module, nn.Linear)}


@pytest.fixture
def attention() -> Attention:
    return Attention().double()


@pytest.fixture
def state_of() -> Callable[[nn.Module], Any]:
    """What must be as before: training flags, hooks, parameters and buffers, the generator."""

    def state_of(model: nn.Module) -> Any:
        modules = list(model.modules())
        return (
            [module.training for module in modules],
            [len(module._forward_hooks) + len(module._forward_pre_hooks) for module in modules],
            {name: tensor.tolist() for name, tensor in model.state_dict().items()},
            torch.get_rng_state().tolist(),
            torch.is_grad_enabled(),
        )

    return state_of
