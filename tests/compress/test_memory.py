"""Old weights are freed one by one as layers are replaced, without waiting for the garbage collector."""

import gc
import weakref
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from dynarank.compress import Compressor, _survey, compress_, plan
from dynarank.compress.forms.matrix import Matrix
from dynarank.layers.base import low_rank_layers

WIDTH, DEPTH = 48, 5


class Chain(nn.Module):
    """A model whose head is found by tracing it."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(WIDTH, WIDTH) for _ in range(DEPTH))
        self.last = nn.Linear(WIDTH, 1)  # too small to be replaced

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = layer(x).relu()
        return self.last(x)


class Fickle(Chain):
    """A model that cannot be traced."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) if float(x.sum()) > -1e9 else x


def sequence() -> nn.Module:
    blocks = [nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.BatchNorm1d(WIDTH), nn.ReLU()) for _ in range(DEPTH)]
    return nn.Sequential(*blocks, nn.Linear(WIDTH, 1))


@pytest.fixture(params=[Chain, Fickle, sequence])
def model(request: pytest.FixtureRequest) -> nn.Module:
    return request.param()


@pytest.fixture
def no_collector() -> Iterator[None]:
    gc.collect()
    gc.disable()
    yield
    gc.enable()


def large_weights(model: nn.Module) -> list[weakref.ref[Any]]:
    return [weakref.ref(p) for p in model.parameters() if p.shape == (WIDTH, WIDTH)]


def alive(weights: list[weakref.ref[Any]]) -> int:
    return sum(weight() is not None for weight in weights)


OPTIONS: dict[str, dict[str, Any]] = {
    "plain": {},
    "calibrated": {"calibration": [torch.ones(9, WIDTH), torch.zeros(9, WIDTH)]},
    "in parts": {"calibration": [torch.eye(WIDTH)], "memory": 2 * 8 * WIDTH**2},
    "timed": {"calibration": [torch.eye(WIDTH)], "timed": 1e-5},
    "renewed": {"calibration": [torch.eye(WIDTH)], "renew_statistics": True},
}


def check_freeing(model: nn.Module, monkeypatch: Any, **options: Any) -> None:
    weights, counts = large_weights(model), []
    put_in_place = plan.put_in_place

    def counted(model: nn.Module, new: Any, *, verb: str) -> None:
        counts.append((alive(weights), len(low_rank_layers(model)) + len(new)))
        put_in_place(model, new, verb=verb)

    monkeypatch.setattr(plan, "put_in_place", counted)
    compress_(model, 0.3, **options)
    assert counts == [(DEPTH - done, done + 1) for done in range(DEPTH)]
    assert alive(weights) == 0


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS.keys())
def test_no_more_than_one_layer_is_held_twice_and_none_in_the_end(
    options: dict[str, Any], no_collector: None, monkeypatch: Any
):
    check_freeing(Chain(), monkeypatch, **options)


def test_that_holds_however_the_head_is_found(model: nn.Module, no_collector: None, monkeypatch: Any):
    check_freeing(model, monkeypatch, calibration=[torch.eye(WIDTH)])


def test_what_is_known_of_layers_holds_none_of_them(no_collector: None):
    model = Chain()
    weights = large_weights(model)
    compressor = Compressor(model, calibration=[torch.eye(WIDTH)])
    planned = compressor.plan(0.3)
    compressor.apply_(planned)
    assert alive(weights) == 0
    assert planned.report.parameters_after > 0


def test_replacements_that_were_tried_are_gone(no_collector: None, monkeypatch: Any):
    built: list[weakref.ref[Any]] = []
    build = Matrix.build

    def noted(self: Matrix, *args: Any) -> nn.Module:
        assert alive(built) == 0, "two replacements at once"
        new = build(self, *args)
        built.append(weakref.ref(new))
        return new

    monkeypatch.setattr(Matrix, "build", noted)
    Compressor(Chain(), calibration=[torch.eye(WIDTH)])
    assert len(built) >= DEPTH and alive(built) == 0


@pytest.mark.parametrize("groups", [1, 2, 5])
def test_moments_are_held_as_many_at_a_time_as_fit(groups: int, monkeypatch: Any):
    asked: list[int] = []
    input_moments = _survey.input_moments

    def counted(model: nn.Module, layers: Any, *args: Any, **kwargs: Any) -> Any:
        asked.append(len(layers))
        return input_moments(model, layers, *args, **kwargs)

    monkeypatch.setattr(_survey, "input_moments", counted)
    size = -(-DEPTH // groups)
    compress_(Chain(), 0.3, calibration=[torch.eye(WIDTH)], memory=size * 8 * WIDTH**2)
    survey = [size] * (DEPTH // size) + [DEPTH % size] * (DEPTH % size > 0)
    assert asked == survey + survey[-2::-1]  # and back again, with the last still held
