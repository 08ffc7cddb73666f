"""How a batch enters a model, and what every layer saw."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from dynarank.layers.conv2d import LowRankConv2d
from dynarank.layers.linear import LowRankLinear
from dynarank.measure import Trace, call, flops, input_moments, latency, trace


def test_a_batch_enters_by_its_kind():
    class Echo(nn.Module):
        def forward(self, x: Any, mask: Any = None) -> Any:
            return x, mask

    x = torch.zeros(2)
    assert call(Echo(), x) == (x, None)
    assert call(Echo(), {"mask": 1, "x": x}) == (x, 1)
    assert call(Echo(), (x, "targets")) == call(Echo(), [x, "targets"]) == (x, None)


@pytest.mark.parametrize("batch", ["text", 3, None, (), []])
def test_any_other_batch_is_refused(batch: Any):
    with pytest.raises(TypeError, match=r"pass forward=lambda model, batch: \.\.\."):
        call(nn.Identity(), batch)


def test_rows_of_a_linear_layer_are_all_but_the_last_dimension(attention: Any):
    seen = trace(attention, attention.layers(), torch.zeros(2, 5, 6, dtype=torch.float64))
    assert seen["query"] == seen["out"] == Trace(10, 1, ((2, 5, 6),), torch.float64)
    assert seen["spare"] == Trace(0, 0, ())


def test_rows_of_a_convolution_are_its_output_positions(convolution: tuple[Any, Tensor]):
    layer, x = convolution
    seen = trace(layer, {"layer": layer}, x)["layer"]
    assert seen.rows == layer(x).numel() // layer.out_channels == input_moments(layer, {"": layer}, [x])[""].rows
    assert (seen.calls, seen.inputs, seen.input_dtype) == (1, (tuple(x.shape),), torch.float64)
    assert not seen.channels_last


def test_low_rank_layers_see_what_their_dense_twins_see():
    for twin, x in (
        (LowRankLinear(5, 7, rank=2), torch.zeros(3, 2, 5)),
        (LowRankConv2d(3, 8, (3, 2), stride=2, rank=2), torch.zeros(3, 3, 7, 6)),
    ):
        dense = twin.to_dense()
        assert trace(twin, {"a": twin}, x) == trace(dense, {"a": dense}, x)


def test_all_calls_add_up():
    layer = nn.Linear(3, 3)
    twice = trace(layer, {"a": layer}, torch.zeros(2, 3), forward=lambda model, x: (model(input=x), model(x[:1])))
    assert twice["a"] == Trace(3, 2, ((2, 3), (1, 3)), torch.float32)


@pytest.mark.parametrize("dimensions", [2, 3])
def test_channels_last_is_noted(dimensions: int):
    layer = {2: nn.Conv2d, 3: nn.Conv3d}[dimensions](3, 4, 1)
    form = {2: torch.channels_last, 3: torch.channels_last_3d}[dimensions]
    x = torch.zeros(2, 3, *dimensions * [5])
    assert not trace(layer, {"a": layer}, x)["a"].channels_last
    assert trace(layer, {"a": layer}, x.contiguous(memory_format=form))["a"].channels_last


def test_the_model_is_run_in_eval_mode_without_gradients_and_left_as_it_was(attention: Any, state_of: Any):
    before = state_of(attention)
    modes = []

    def forward(model: nn.Module, batch: Tensor) -> None:
        torch.rand(1)
        modes.append((torch.is_grad_enabled(), *(module.training for module in model.modules())))
        model(batch)

    trace(attention, attention.layers(), torch.zeros(2, 5, 6, dtype=torch.float64), forward=forward)
    assert not any(modes[0])
    assert state_of(attention) == before


def test_the_model_is_left_as_it_was_when_the_forward_pass_fails(attention: Any, state_of: Any):
    before = state_of(attention)
    with pytest.raises(ValueError, match=r"calibration batch 0 of shape \(2, 5, 7\) does not fit the model: "):
        trace(attention, attention.layers(), torch.zeros(2, 5, 7, dtype=torch.float64))
    assert state_of(attention) == before


def test_a_model_that_writes_to_its_input_leaves_the_batch_as_it_was():
    layer, x = nn.Linear(3, 2), torch.ones(4, 3)
    forward = lambda model, batch: model(batch.add_(1))  # noqa: E731
    trace(layer, {"layer": layer}, x, forward=forward)
    flops(layer, x, forward=forward)
    latency({"layer": layer}, x, forward=forward, rounds=1)
    assert torch.equal(x, torch.ones(4, 3))


def test_a_layer_that_gets_no_tensor_is_named():
    layer = nn.Identity()
    with pytest.raises(TypeError, match="stem: Identity must be called with a tensor"):
        trace(layer, {"stem": layer}, None, forward=lambda model, batch: model(3))
    assert not layer._forward_hooks
