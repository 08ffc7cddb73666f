"""Laws of VGG16: the size by hand, the plain formula, narrower ones never exceed the size asked for."""

from itertools import pairwise
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional

import dynarank
from dynarank.factorize import deployed_parameters
from dynarank.models.vgg16 import VGG16, vgg16_parameters

DEFAULT = (64, 128, 256, 512, 512)


def meta(*arguments: Any, **options: Any) -> VGG16:
    with torch.device("meta"):
        return VGG16(*arguments, **options)


def test_the_defaults_have_the_size_by_hand():
    first, second = 3 * 64 + 64 * 64, 64 * 128 + 128 * 128
    others = 128 * 256 + 2 * 256 * 256 + 256 * 512 + 5 * 512 * 512
    weights = 9 * (first + second + others) + 512 * 10
    channels = 2 * 64 + 2 * 128 + 3 * 256 + 6 * 512
    assert (weights, channels) == (14_715_584, 4_224)
    assert sum(p.numel() for p in meta().parameters()) == weights + 2 * channels + 10
    assert vgg16_parameters(DEFAULT) == weights + 4 * channels + 13 + 10 == 14_732_503


def test_thirteen_convolutions_and_a_head_have_readable_names():
    layers = [name for name, m in meta().named_modules() if isinstance(m, nn.Conv2d | nn.Linear)]
    inner = [f"stages.{stage}.{3 * layer}" for stage, depth in enumerate((2, 2, 3, 3, 3)) for layer in range(depth)]
    assert layers == [*inner, "head"]


@pytest.mark.parametrize("widths", [(1, 1, 1, 1, 1), (2, 3, 5, 4, 7)])
@pytest.mark.parametrize(("classes", "channels"), [(10, 3), (3, 1)])
def test_the_formula_counts_every_number(widths: tuple, classes: int, channels: int):
    model = VGG16(widths, classes=classes, channels=channels)
    assert vgg16_parameters(widths, classes=classes, channels=channels) == deployed_parameters(model)
    assert model(torch.zeros(2, channels, 64, 32)).shape == (2, classes)


def test_it_is_the_plain_formula():
    model = VGG16((2, 3, 5, 4, 7), classes=3).double()
    images = torch.randn(3, 3, 64, 32, dtype=torch.float64)

    def normalised(x: torch.Tensor) -> torch.Tensor:
        mean, variance = x.mean((0, 2, 3), keepdim=True), x.var((0, 2, 3), keepdim=True, correction=0)
        return (x - mean) / torch.sqrt(variance + 1e-5)

    features = images
    for stage, depth in enumerate((2, 2, 3, 3, 3)):
        for layer in range(depth):
            weight = model.get_parameter(f"stages.{stage}.{3 * layer}.weight")
            features = normalised(functional.conv2d(features, weight, padding=1)).relu()
        N, C, height, width = features.shape
        features = features.reshape(N, C, height // 2, 2, width // 2, 2).amax((3, 5))
    assert features.shape == (3, 7, 2, 1)
    expected = features.mean((2, 3)) @ model.head.weight.mT + model.head.bias
    torch.testing.assert_close(model(images), expected)


def test_convolutions_start_he_normal():
    weight = VGG16((64, 1, 1, 1, 1)).get_parameter("stages.0.3.weight")
    torch.testing.assert_close(weight.std() * (9 * 64 / 2) ** 0.5, torch.tensor(1.0), atol=0.03, rtol=0)


@pytest.mark.parametrize("share", [0.01, 0.05, 0.1, 0.25, 0.5, 0.9, 0.999])
def test_narrower_never_exceeds_and_comes_close(share: float):
    parameters = int(share * vgg16_parameters(DEFAULT))
    with torch.device("meta"):
        narrower, again = VGG16().narrower(parameters), VGG16().narrower(parameters)
    assert narrower.widths == again.widths
    assert 0.97 * parameters < vgg16_parameters(narrower.widths) <= parameters
    factors = [narrow / wide for narrow, wide in zip(narrower.widths, DEFAULT, strict=True)]
    assert max(factors) <= 1 and max(factors) - min(factors) < 2 / 64


def test_narrower_grows_with_the_size_asked_for():
    model = VGG16((5, 9, 13, 11, 7), classes=3, channels=1)
    counts = [deployed_parameters(model.narrower(parameters)) for parameters in range(300, 16_000, 500)]
    assert all(before <= after for before, after in pairwise(counts))


@pytest.mark.parametrize("widths", [(3, 3, 3, 3, 3), (2, 3, 5, 4, 7)])
def test_narrower_is_the_model_itself_at_its_own_count_and_beyond(widths: tuple):
    model = VGG16(widths, classes=3, channels=1)
    for parameters in (deployed_parameters(model), 10**9):
        narrower = model.narrower(parameters)
        assert (narrower.widths, narrower.classes, narrower.channels) == (widths, 3, 1)


def test_narrower_names_the_smallest_size():
    smallest = deployed_parameters(VGG16((1, 1, 1, 1, 1)))
    model = VGG16((4, 4, 4, 4, 4))
    assert model.narrower(smallest).widths == (1, 1, 1, 1, 1)
    with pytest.raises(ValueError, match=f"parameters must be at least {smallest}, got {smallest - 1}"):
        model.narrower(smallest - 1)


def test_every_convolution_can_be_factorised():
    model = VGG16((8, 9, 11, 8, 9))
    report = dynarank.factorize_(model, rank=2)
    assert sum(entry.rank is not None for entry in report.entries) == 13
    assert next(entry.name for entry in report.kept_dense) == "head"
    assert model(torch.zeros(2, 3, 32, 32)).shape == (2, 10)


def test_it_exports_as_one_graph():
    model = VGG16((2, 3, 5, 4, 7)).eval()
    images = torch.randn(2, 3, 32, 32)
    torch.testing.assert_close(torch.export.export(model, (images,)).module()(images), model(images))


def test_an_image_that_would_vanish_is_refused():
    with pytest.raises(ValueError, match=r"both sides of an image must be at least 32, got \(32, 31\)"):
        VGG16((1, 1, 1, 1, 1))(torch.zeros(2, 3, 32, 31))


@pytest.mark.parametrize("options", [{"widths": (0, 5, 5, 5, 5)}, {"widths": (5, 5)}, {"classes": 0}, {"channels": 0}])
def test_empty_sizes_are_refused(options: dict):
    with pytest.raises(ValueError, match="must be at least 1, got"):
        VGG16(**options)
