"""Laws of LeNet5: the published count, ReLU and pooling commute, narrower ones never exceed the size asked for."""

import pytest
import torch
from torch.nn import functional

from dynarank.models.lenet5 import LeNet5, lenet5_parameters


def count(model: torch.nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters())


def test_the_defaults_have_the_published_size():
    parameters = dict(LeNet5().named_parameters())
    assert sum(p.numel() for name, p in parameters.items() if name.endswith("weight")) == 430_500
    assert sum(p.numel() for name, p in parameters.items() if name.endswith("bias")) == 580
    assert [name for name, _ in LeNet5().named_children()] == ["conv1", "conv2", "fc1", "head"]


def test_forward_is_the_plain_formula_with_relu_before_pooling():
    model = LeNet5((3, 4), hidden=7, classes=5, image=20).double()
    images = torch.randn(2, 1, 20, 20, dtype=torch.float64)
    features = functional.max_pool2d(torch.relu(functional.conv2d(images, model.conv1.weight, model.conv1.bias)), 2)
    features = functional.max_pool2d(torch.relu(functional.conv2d(features, model.conv2.weight, model.conv2.bias)), 2)
    hidden = torch.relu(features.reshape(2, -1) @ model.fc1.weight.T + model.fc1.bias)
    torch.testing.assert_close(model(images), hidden @ model.head.weight.T + model.head.bias)


@pytest.mark.parametrize("image", [16, 17, 20, 28, 32])
def test_the_formula_counts_every_parameter(image: int):
    model = LeNet5((3, 7), hidden=11, classes=5, image=image)
    assert lenet5_parameters((3, 7), hidden=11, classes=5, image=image) == count(model)
    assert model(torch.zeros(2, 1, image, image)).shape == (2, 5)


@pytest.mark.parametrize("parameters", [3_000, 10_031, 12_895, 19_360, 21_510, 43_000, 129_000, 300_000, 431_079])
def test_narrower_never_exceeds_and_comes_close(parameters: int):
    narrower = LeNet5().narrower(parameters)
    assert 0.96 * parameters < count(narrower) <= parameters
    assert narrower.channels[0] <= 20
    assert narrower.channels[1] <= 50
    assert narrower.hidden <= 500


def test_narrower_keeps_the_convolutions_wide():
    narrower = LeNet5().narrower(20_000)
    assert abs(narrower.channels[1] - 2 * narrower.channels[0]) <= 1
    assert 5 <= narrower.hidden / narrower.channels[0] <= 7


def test_narrower_is_the_model_itself_at_its_own_count_and_beyond():
    for model in (LeNet5(), LeNet5((20, 10), hidden=12, classes=3, image=20)):
        for parameters in (count(model), 10**9):
            narrower = model.narrower(parameters)
            assert (narrower.channels, narrower.hidden) == (model.channels, model.hidden)


def test_narrower_names_the_smallest_size():
    smallest = count(LeNet5((1, 1), hidden=1))
    assert count(LeNet5().narrower(smallest)) == smallest
    with pytest.raises(ValueError, match=f"parameters must be at least {smallest}, got 0"):
        LeNet5().narrower(0)


def test_an_image_that_vanishes_is_refused():
    with pytest.raises(ValueError, match=r"image must be at least 16, got 8. Use MLP for smaller ones"):
        LeNet5(image=8)


@pytest.mark.parametrize("options", [{"channels": (0, 5)}, {"channels": (5,)}, {"hidden": 0}, {"classes": 0}])
def test_empty_sizes_are_refused(options: dict):
    with pytest.raises(ValueError, match="must be at least 1, got"):
        LeNet5(**options)
