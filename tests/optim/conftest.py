"""A small network with low-rank layers, data for it, and what the tests compare."""

from collections.abc import Callable, Iterable
from functools import partial
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from dynarank.layers.conv2d import LowRankConv2d
from dynarank.layers.linear import LowRankLinear
from dynarank.optim.low_rank_optimizer import LowRankOptimizer
from dynarank.optim.steps import take_step
from dynarank.schedules.periodic import Periodic

NEVER = Periodic(every=10**9)
INTEGRATORS = ("gauge_fixed_muon", "tangent_muon")  # the default, in place; and one that keeps the gauge


def make_model(*, rank: int = 3, rank_multiple: int = 1, dtype: torch.dtype = torch.float64, seed: int = 0) -> Any:
    """A wide and a tall low-rank layer, biases, a norm with buffers, and a dense head."""
    torch.manual_seed(seed)
    options = {"rank": rank, "rank_multiple": rank_multiple}
    return nn.Sequential(
        LowRankLinear(12, 20, **options),
        nn.Tanh(),
        LowRankLinear(20, 9, **options),
        nn.LayerNorm(9),
        nn.Linear(9, 4),
    ).to(dtype)


def make_conv_model(*, rank: int = 3, dtype: torch.dtype = torch.float64) -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(
        LowRankConv2d(2, 6, 3, rank=rank), nn.BatchNorm2d(6), nn.ReLU(), nn.Flatten(), nn.Linear(54, 3)
    ).to(dtype)


def make_optimizer(model: nn.Module, **options: Any) -> LowRankOptimizer:
    """An optimizer without rank events, with SGD for the rest, unless told otherwise."""
    options = {"lr": 0.05, "base": torch.optim.SGD, "base_options": {"lr": 0.05}, "schedule": NEVER} | options
    return LowRankOptimizer(model, **options)


def batch(step: int, *, dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor]:
    """The batch of a step: inputs ``(8, 12)`` and classes that depend on them."""
    x = torch.randn(8, 12, generator=torch.Generator().manual_seed(1000 + step), dtype=torch.float64)
    return x.to(dtype), x[:, :4].argmax(dim=1)


def backward(model: Any, step: int = 0) -> Tensor:
    """Fill the gradients for the batch of a step, after clearing them, and return the loss."""
    model.zero_grad()
    x, y = batch(step, dtype=next(model.parameters()).dtype)
    loss = nn.functional.cross_entropy(model(x).float() if x.dtype.itemsize == 2 else model(x), y)
    loss.backward()
    return loss


def train(model: Any, optimizer: Any, steps: Iterable[int]) -> list[float]:
    """Return the losses of an ordinary loop."""
    return [take_step(optimizer, partial(backward, model, step)).item() for step in steps]


def snapshot(model: nn.Module, optimizer: LowRankOptimizer) -> dict[str, Any]:
    """Return a copy of every tensor and number of model and optimizer, gradients left out."""
    return {
        "model": {key: value.clone() for key, value in model.state_dict().items()},
        "optimizer": _copied(optimizer.state_dict()),
    }


def _copied(tree: Any) -> Any:
    if isinstance(tree, Tensor):
        return tree.clone()
    if isinstance(tree, dict):
        return {key: _copied(value) for key, value in tree.items()}
    return type(tree)(_copied(value) for value in tree) if isinstance(tree, list | tuple) else tree


def assert_same(found: Any, expected: Any, path: str = "") -> None:
    """Assert that two trees agree to the last bit."""
    if isinstance(expected, Tensor):
        assert found.dtype == expected.dtype and torch.equal(found, expected), path
    elif isinstance(expected, dict):
        assert found.keys() == expected.keys(), path
        for key in expected:
            assert_same(found[key], expected[key], f"{path}.{key}")
    elif isinstance(expected, list | tuple):
        assert len(found) == len(expected), path
        for index, pair in enumerate(zip(found, expected, strict=True)):
            assert_same(*pair, f"{path}[{index}]")
    else:
        assert found == expected, path


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """Run what names no integrator with both kinds."""
    if "kit" in metafunc.fixturenames:
        kinds = INTEGRATORS[:1] if "integrator" in metafunc.fixturenames else INTEGRATORS
        metafunc.parametrize("kit", kinds, indirect=True)


@pytest.fixture
def kit(request: pytest.FixtureRequest) -> Any:
    """The functions above, for all test files of this folder, with an integrator for those that do not care."""
    names: dict[str, Callable[..., Any]] = {
        f.__name__: f for f in (make_model, make_conv_model, batch, backward, take_step, train, snapshot, assert_same)
    }
    make = partial(make_optimizer, integrator=request.param)
    return SimpleNamespace(**names, make_optimizer=make, NEVER=NEVER)
