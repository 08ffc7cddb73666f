"""Building by name, and what every reference model must allow."""

import pytest
import torch

from dynarank.models import MLP, LeNet5, LinearNetwork, build

CASES = [
    ("mlp", (1, 28, 28), 10, MLP),
    ("mlp", (1, 8, 8), 10, MLP),
    ("lenet5", (1, 28, 28), 10, LeNet5),
    ("linear", (64,), 48, LinearNetwork),
]


@pytest.mark.parametrize(("name", "input_shape", "outputs", "kind"), CASES)
def test_a_name_builds_a_model_for_the_shapes(name: str, input_shape: tuple, outputs: int, kind: type):
    model = build(name, input_shape, outputs)
    assert isinstance(model, kind)
    assert model(torch.zeros(3, *input_shape)).shape == (3, outputs)


@pytest.mark.parametrize(("name", "input_shape", "outputs", "kind"), CASES)
def test_a_model_exports_as_one_graph(name: str, input_shape: tuple, outputs: int, kind: type):
    model = build(name, input_shape, outputs).eval()
    inputs = torch.randn(3, *input_shape)
    exported = torch.export.export(model, (inputs,)).module()
    torch.testing.assert_close(exported(inputs), model(inputs))


def test_initialisation_follows_the_global_generator():
    first = build("mlp", (7,), 3, hidden=(5,))
    torch.manual_seed(1)
    second = build("mlp", (7,), 3, hidden=(5,))
    torch.manual_seed(1)
    third = build("mlp", (7,), 3, hidden=(5,))
    assert not torch.equal(first.head.weight, second.head.weight)
    assert torch.equal(second.head.weight, third.head.weight)


def test_options_reach_the_model():
    assert build("mlp", (7,), 3, hidden=(5, 4)).hidden == (5, 4)
    assert build("lenet5", (1, 28, 28), 10, channels=(8, 16), hidden=60).channels == (8, 16)


@pytest.mark.parametrize("input_shape", [(784,), (3, 32, 32), (1, 28, 27)])
def test_lenet5_refuses_other_samples(input_shape: tuple):
    with pytest.raises(ValueError, match=r"'lenet5' takes samples of shape \(1, side, side\), got .* Use 'mlp'"):
        build("lenet5", input_shape, 10)


def test_an_unknown_name_lists_the_known_ones():
    with pytest.raises(ValueError, match=r"unknown model 'lenet'. Available: lenet5, linear, mlp"):
        build("lenet", (1, 28, 28), 10)
