"""Sharing and several passes give what one pass over every layer alone gives; refusals leave the model as it was."""

import weakref
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from dynarank.measure import Moments, input_moments

EXACT = {"atol": 1e-12, "rtol": 1e-12}


def sequences(*lengths: int) -> list[Tensor]:
    return [torch.randn(2, length, 6, dtype=torch.float64) for length in lengths]


def assert_same(found: dict[str, Moments], expected: dict[str, Moments]) -> None:
    assert list(found) == list(expected)
    for name, moments in found.items():
        other = expected[name]
        torch.testing.assert_close((moments.second, moments.mean), (other.second, other.mean), **EXACT)
        assert moments.rows == other.rows


def one_by_one(model: nn.Module, modules: dict[str, nn.Module], batches: list[Tensor]) -> dict[str, Moments]:
    found = {}
    for name, module in modules.items():
        found |= input_moments(model, {name: module}, batches)
    return found


def test_layers_with_the_very_same_input_share_their_moments(attention: Any):
    batches = sequences(3, 4)
    found = input_moments(attention, attention.layers(), batches)
    assert found["query"] is found["key"] is found["value"]
    assert found["out"] is not found["query"]
    assert_same(found, one_by_one(attention, attention.layers(), batches))


def test_writing_to_an_input_makes_it_another_and_the_batch_is_kept():
    net = nn.ModuleList([nn.Linear(5, 2), nn.Linear(5, 2)]).double()

    def forward(model: Any, batch: Tensor) -> None:
        model[0](batch)
        batch.add_(1)  # the same object in another state
        model[1](batch)

    x = torch.zeros(3, 5, dtype=torch.float64)
    found = input_moments(net, {"0": net[0], "1": net[1]}, [x], forward=forward, memory=1)
    assert [found[name].mean.tolist() for name in "01"] == [5 * [0.0], 5 * [1.0]]
    assert not x.any()


def test_a_linear_layer_and_a_convolution_of_one_input_do_not_share():
    net = nn.ModuleDict({"linear": nn.Linear(6, 2), "convolution": nn.Conv1d(4, 2, 3)}).double()
    x = torch.randn(3, 4, 6, dtype=torch.float64)
    forward = lambda model, batch: [layer(batch) for layer in model.values()]  # noqa: E731
    found = input_moments(net, dict(net.items()), [x], forward=forward)
    assert found["linear"].second.shape == (6, 6) and found["convolution"].second.shape == (12, 12)


class Fork(nn.Module):
    """Two layers that share their input until the third batch."""

    def __init__(self) -> None:
        super().__init__()
        self.left, self.right = nn.Linear(5, 2), nn.Linear(5, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.left(x) + self.right(x if len(x) != 4 else x.clone() * 2)


def test_layers_that_stop_sharing_are_told_apart():
    net = Fork().double()
    batches = [torch.randn(rows, 5, dtype=torch.float64) for rows in (2, 3, 4, 2)]
    layers = {"left": net.left, "right": net.right}
    found = input_moments(net, layers, batches)
    assert found["left"] is not found["right"]
    assert_same(found, one_by_one(net, layers, batches))
    with pytest.raises(TypeError, match="stopped sharing their inputs, but batches is a list_iterator"):
        input_moments(net, layers, iter(batches))


@pytest.mark.parametrize("memory", [1, 8 * 36, 2 * 8 * 36 + 7])
def test_several_passes_give_the_same_as_one(attention: Any, memory: int):
    batches = sequences(3, 4, 1)
    expected = input_moments(attention, attention.layers(), batches)
    assert_same(input_moments(attention, attention.layers(), batches, memory=memory), expected)


def test_as_many_passes_as_the_memory_needs(attention: Any):
    passes = []

    class Counted(list[Any]):
        def __iter__(self) -> Iterator[Any]:
            passes.append(len(self))
            return super().__iter__()

    # Three sums of 6 x 6: of query, key and value together, of out, of the layer that is never called.
    for memory, expected in ((3 * 8 * 36, 1), (3 * 8 * 36 - 1, 2), (8 * 36, 3), (1, 3)):
        passes.clear()
        input_moments(attention, attention.layers(), Counted(sequences(3, 4)), memory=memory)
        assert len(passes) == expected


def test_an_iterator_is_enough_for_one_pass(attention: Any):
    batches = sequences(3, 4, 1)
    expected = input_moments(attention, attention.layers(), batches)
    assert_same(input_moments(attention, attention.layers(), iter(batches)), expected)


def test_a_layer_that_is_never_called_has_no_entry(attention: Any):
    found = input_moments(attention, attention.layers(), sequences(3))
    assert list(found) == ["query", "key", "value", "out"]


def test_a_transformer_layer_of_torch_calls_its_parts():
    net = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)
    found = input_moments(net, {"linear1": net.linear1, "linear2": net.linear2}, [torch.randn(2, 3, 8)])
    assert found["linear1"].rows == found["linear2"].rows == 6


def not_finite(value: float) -> list[Tensor]:
    batches = sequences(3, 4)
    batches[1][0, 2, 5] = value
    return batches


REFUSALS: dict[str, tuple[Callable[[], Any], dict[str, Any], type[Exception], str]] = {
    "none": (list, {}, ValueError, "at least one calibration batch, got none"),
    "empty-iterator": (lambda: iter([]), {}, ValueError, "at least one calibration batch, got none"),
    "one-tensor": (lambda: sequences(3)[0], {}, TypeError, r"got Tensor; pass \[batch\]"),
    "one-mapping": (lambda: {"x": sequences(3)[0]}, {}, TypeError, r"got dict; pass \[batch\]"),
    "strange-batch": (lambda: ["text"], {}, TypeError, "got str; pass forward=lambda model, batch"),
    "nan": (lambda: not_finite(float("nan")), {}, ValueError, "query: .* NaN or infinity in calibration batch 1"),
    "inf": (lambda: not_finite(float("-inf")), {}, ValueError, "query: .* NaN or infinity in calibration batch 1"),
    "shape": (
        lambda: [torch.zeros(2, 3, 5, dtype=torch.float64)],
        {},
        ValueError,
        r"calibration batch 0 of shape \(2, 3, 5\) does not fit the model: ",
    ),
    "shape-later": (
        lambda: [*sequences(3), (torch.zeros(2, 3, 5, dtype=torch.float64), "targets")],
        {},
        ValueError,
        r"calibration batch 1 of shape \(2, 3, 5\) does not fit the model: ",
    ),
    "dtype": (lambda: [sequences(3)[0].float()], {}, RuntimeError, "(?i)type"),
    "iterator": (
        lambda: iter(sequences(3, 4)),
        {"memory": 300},
        TypeError,
        "3 passes are needed .* memory = 300 bytes, but batches is a list_iterator .*; pass a list or a DataLoader",
    ),
    "memory": (lambda: sequences(3), {"memory": 0}, ValueError, "memory must be at least 1 byte, got 0"),
}


@pytest.mark.parametrize("case", REFUSALS.values(), ids=REFUSALS.keys())
def test_a_refusal_leaves_the_model_as_it_was(attention: Any, state_of: Any, case: Any):
    batches, options, error, message = case
    batches = batches()
    before = state_of(attention)
    with pytest.raises(error, match=message):
        input_moments(attention, attention.layers(), batches, **options)
    assert state_of(attention) == before


def test_success_leaves_the_model_as_it_was(attention: Any, state_of: Any):
    batches = sequences(3)
    before = state_of(attention)
    input_moments(attention, attention.layers(), batches)
    assert state_of(attention) == before


def test_batches_that_run_dry_are_refused(attention: Any):
    class Dry:
        left = 2

        def __iter__(self) -> Iterator[Any]:
            while self.left:
                self.left -= 1
                yield torch.randn(1, 2, 6, dtype=torch.float64)

    with pytest.raises(ValueError, match="gave 2 batches on the first pass and 0 on another"):
        input_moments(attention, attention.layers(), Dry(), memory=1)


@pytest.mark.parametrize("layer", [nn.Conv2d(4, 4, 1, groups=2), nn.Embedding(3, 4), nn.ConvTranspose1d(4, 4, 1)])
def test_a_layer_of_another_kind_is_refused_by_name(layer: nn.Module):
    with pytest.raises(TypeError, match=rf"stem must be .* got {type(layer).__name__}"):
        input_moments(layer, {"stem": layer}, [torch.zeros(1, 4)])


def test_no_activation_outlives_its_forward_pass(attention: Any):
    alive = []

    def forward(model: Any, batch: Tensor) -> None:
        handle = model.out.register_forward_pre_hook(lambda layer, inputs: alive.append(weakref.ref(inputs[0])))
        model(batch)
        handle.remove()
        assert alive[-1]() is None

    input_moments(attention, attention.layers(), sequences(3, 4), forward=forward)
    assert len(alive) == 3  # each batch, and the first one before to see who shares
