"""Laws of ResNet20: the published count, shortcuts that copy, narrower ones never exceed the size asked for."""

from itertools import pairwise

import pytest
import torch
from torch.nn import functional

import dynarank
from dynarank.factorize import deployed_parameters
from dynarank.models.resnet20 import BasicBlock, ResNet20, resnet20_parameters, shortcut


def test_the_defaults_have_the_published_size():
    model = ResNet20()
    stages = [6 * 16 * 16, 16 * 32 + 5 * 32 * 32, 32 * 64 + 5 * 64 * 64]
    weights = 9 * (3 * 16 + sum(stages)) + 64 * 10
    channels = 7 * 16 + 6 * 32 + 6 * 64
    assert weights == 268_336
    assert sum(p.numel() for p in model.parameters()) == weights + 2 * channels + 10 == 269_722
    assert deployed_parameters(model) == 269_722 + 2 * channels + 19


def test_twenty_layers_have_readable_names():
    layers = [name for name, m in ResNet20().named_modules() if isinstance(m, torch.nn.Conv2d | torch.nn.Linear)]
    inner = [f"stages.{s}.{b}.conv{c}" for s in range(3) for b in range(3) for c in (1, 2)]
    assert layers == ["stem", *inner, "head"]


@pytest.mark.parametrize("widths", [(1, 1, 1), (3, 3, 7), (5, 11, 13)])
@pytest.mark.parametrize(("classes", "channels"), [(10, 3), (3, 1)])
def test_the_formula_counts_every_number(widths: tuple, classes: int, channels: int):
    model = ResNet20(widths, classes=classes, channels=channels)
    assert resnet20_parameters(widths, classes=classes, channels=channels) == deployed_parameters(model)
    assert model(torch.zeros(2, channels, 12, 9)).shape == (2, classes)


def test_the_stages_halve_the_image_twice():
    features = torch.zeros(2, 3, 32, 32)
    for stage, shape in zip(ResNet20((3, 5, 7)).stages, [(3, 32, 32), (5, 16, 16), (7, 8, 8)], strict=True):
        features = stage(features)
        assert features.shape == (2, *shape)


@pytest.mark.parametrize(("outputs", "stride"), [(3, 1), (3, 2), (4, 2), (7, 2), (5, 1)])
def test_the_shortcut_copies_pixels_and_adds_zero_channels(outputs: int, stride: int):
    features = torch.randn(2, 3, 5, 8)
    rows, columns = range(0, 5, stride), range(0, 8, stride)
    expected = torch.zeros(2, outputs, len(rows), len(columns))
    for i, row in enumerate(rows):
        for j, column in enumerate(columns):
            expected[:, :3, i, j] = features[:, :, row, column]
    assert torch.equal(shortcut(features, stride=stride, extra=outputs - 3), expected)


def test_a_block_whose_residual_vanishes_is_its_shortcut():
    block = BasicBlock(3, 7, stride=2)
    torch.nn.init.zeros_(block.norm2.weight)
    features = torch.rand(2, 3, 5, 8)
    assert torch.equal(block(features), shortcut(features, stride=2, extra=4))


@pytest.mark.parametrize(("outputs", "stride"), [(3, 1), (7, 2)])
def test_a_block_is_the_plain_formula(outputs: int, stride: int):
    block = BasicBlock(3, outputs, stride=stride).double()
    features = torch.randn(2, 3, 5, 8, dtype=torch.float64)

    def normalised(x: torch.Tensor) -> torch.Tensor:
        mean, variance = x.mean((0, 2, 3), keepdim=True), x.var((0, 2, 3), keepdim=True, correction=0)
        return (x - mean) / torch.sqrt(variance + 1e-5)

    hidden = torch.relu(normalised(functional.conv2d(features, block.conv1.weight, stride=stride, padding=1)))
    hidden = normalised(functional.conv2d(hidden, block.conv2.weight, padding=1))
    hidden[:, :3] += features[:, :, ::stride, ::stride]
    torch.testing.assert_close(block(features), torch.relu(hidden))


def test_convolutions_start_he_normal():
    for before, after in ((3, 500), (64, 64)):
        weight = BasicBlock(before, after).conv1.weight
        torch.testing.assert_close(weight.std() * (9 * before / 2) ** 0.5, torch.tensor(1.0), atol=0.03, rtol=0)


@pytest.mark.parametrize("widths", [(16, 32, 64), (32, 64, 128)])
@pytest.mark.parametrize("parameters", [16_000, 27_112, 54_000, 90_001, 135_000, 200_000, 271_116])
def test_narrower_never_exceeds_and_comes_close(widths: tuple, parameters: int):
    model = ResNet20(widths)
    narrower = model.narrower(parameters)
    assert 0.98 * parameters < deployed_parameters(narrower) <= parameters
    assert all(narrow <= wide for narrow, wide in zip(narrower.widths, widths, strict=True))
    assert narrower.widths == model.narrower(parameters).widths


def test_narrower_scales_all_widths_by_one_factor():
    for parameters in range(20_000, 270_000, 25_000):
        widths = ResNet20().narrower(parameters).widths
        factors = [width / wide for width, wide in zip(widths, (16, 32, 64), strict=True)]
        assert max(factors) - min(factors) < 3 / 16


def test_narrower_grows_with_the_size_asked_for():
    model = ResNet20((5, 9, 13), classes=3, channels=1)
    counts = [deployed_parameters(model.narrower(parameters)) for parameters in range(400, 16_000, 300)]
    assert all(before <= after for before, after in pairwise(counts))


@pytest.mark.parametrize("widths", [(16, 32, 64), (3, 3, 3), (5, 6, 13)])
def test_narrower_is_the_model_itself_at_its_own_count_and_beyond(widths: tuple):
    model = ResNet20(widths, classes=3, channels=1)
    for parameters in (deployed_parameters(model), 10**9):
        narrower = model.narrower(parameters)
        assert (narrower.widths, narrower.classes, narrower.channels) == (widths, 3, 1)


def test_narrower_names_the_smallest_size():
    smallest = deployed_parameters(ResNet20((1, 1, 1)))
    assert ResNet20().narrower(smallest).widths == (1, 1, 1)
    with pytest.raises(ValueError, match=f"parameters must be at least {smallest}, got {smallest - 1}"):
        ResNet20().narrower(smallest - 1)


def test_every_convolution_can_be_factorised():
    model = ResNet20((8, 11, 17))
    report = dynarank.factorize_(model, rank=2)
    assert sum(entry.rank is not None for entry in report.entries) == 19
    assert model(torch.zeros(2, 3, 8, 8)).shape == (2, 10)


def test_it_exports_as_one_graph():
    model = ResNet20((3, 5, 7)).eval()
    images = torch.randn(2, 3, 8, 8)
    torch.testing.assert_close(torch.export.export(model, (images,)).module()(images), model(images))


def test_a_narrower_later_stage_is_refused():
    with pytest.raises(ValueError, match=r"widths must not decrease, got \(16, 8, 64\)"):
        ResNet20((16, 8, 64))


@pytest.mark.parametrize("options", [{"widths": (0, 5, 5)}, {"widths": (5, 5)}, {"classes": 0}, {"channels": 0}])
def test_empty_sizes_are_refused(options: dict):
    with pytest.raises(ValueError, match="must be at least 1, got"):
        ResNet20(**options)
