"""What makes a model compressible that fits into memory once: never a second copy, and moments within their limit."""

import weakref
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from dynarank.compress import Compressor
from dynarank.compress.forms.matrix import Matrix
from dynarank.measure import stored_bytes

WIDTH, BLOCKS = 48, 12


class Block(nn.Module):
    """A residual block of two layers, the second with four times as many inputs."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(WIDTH, 4 * WIDTH, bias=False), nn.Linear(4 * WIDTH, WIDTH, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.down(nn.functional.gelu(self.up(x)))


class Live(TorchDispatchMode):
    """Counts the bytes of the tensors that were made since it was entered and are still there, and their peak."""

    def __init__(self) -> None:
        super().__init__()
        self.live = self.peak = 0
        self._known: dict[int, Any] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self._note((args, kwargs), new=False)
        output = func(*args, **(kwargs or {}))
        self._note(output, new=True)
        return output

    def _note(self, tree: Any, *, new: bool) -> None:
        for storage in (leaf.untyped_storage() for leaf in tree_leaves(tree) if isinstance(leaf, Tensor)):
            key, size = storage._cdata, storage.nbytes() if new else 0
            if key not in self._known:
                self._known[key] = weakref.ref(storage, lambda _, key=key, size=size: self._leave(key, size))
                self.live += size
                self.peak = max(self.peak, self.live)

    def _leave(self, key: int, size: int) -> None:
        del self._known[key]
        self.live -= size


@pytest.fixture
def model() -> nn.Sequential:
    return nn.Sequential(*(Block() for _ in range(BLOCKS)))


@pytest.fixture(params=["svd", "activation_aware"])
def options(request: pytest.FixtureRequest) -> dict[str, Any]:
    batches = [torch.randn(64, WIDTH) for _ in range(3)] if request.param == "activation_aware" else None
    return {"calibration": batches, "include_head": True, "measured_sensitivity": False, "memory": moment_bytes()}


def moment_bytes() -> int:
    """The moments of one block in float64."""
    return 8 * (WIDTH**2 + (4 * WIDTH) ** 2)


def layer_bytes() -> int:
    """A weight in float64."""
    return 8 * 4 * WIDTH**2


def linear_layers(model: nn.Module) -> Iterator[nn.Linear]:
    return (module for module in model.modules() if isinstance(module, nn.Linear))


def test_analysis_holds_a_few_layers_and_the_moments_it_may(model: nn.Module, options: dict[str, Any]) -> None:
    with Live() as memory:
        Compressor(model, **options)
    # Sums, their means, and one more while a mean is taken; spectra of one layer, a few matrices of its size.
    moments = 3 * moment_bytes() if options["calibration"] else 0
    assert memory.peak < moments + 6 * layer_bytes()


def test_without_calibration_analysis_holds_less_than_a_second_copy(model: nn.Module) -> None:
    with Live() as memory:
        Compressor(model)
    assert memory.peak < stored_bytes(model)


def test_each_weight_is_gone_before_the_next_is_replaced(
    model: nn.Module, options: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    weights = [weakref.ref(layer.weight) for layer in linear_layers(model)]
    alive = []
    build = Matrix.build

    def watched(*args: Any, **kwargs: Any) -> nn.Module:
        alive.append(sum(weight() is not None for weight in weights))
        return build(*args, **kwargs)

    compressor = Compressor(model, **options)
    plan = compressor.plan(0.3)
    monkeypatch.setattr(Matrix, "build", watched)
    compressor.apply_(plan)
    assert len(alive) > BLOCKS
    assert alive == list(range(len(weights), len(weights) - len(alive), -1))


def test_compression_holds_the_new_weights_and_a_few_layers(model: nn.Module, options: dict[str, Any]) -> None:
    compressor = Compressor(model, **options)
    plan = compressor.plan(0.5)
    with Live() as memory:
        compressor.apply_(plan)
    moments = 3 * moment_bytes() if options["calibration"] else 0
    assert memory.peak < stored_bytes(model) + moments + 5 * layer_bytes()  # stored: what is new


def test_moments_are_gathered_for_as_many_layers_as_may_be_in_memory(model: nn.Module) -> None:
    batches = [torch.randn(64, WIDTH)]
    peaks = []
    for blocks in (1, 6):
        with Live() as memory:
            Compressor(model, calibration=batches, measured_sensitivity=False, memory=blocks * moment_bytes())
        peaks.append(memory.peak)
    assert peaks[0] < peaks[1] / 2
