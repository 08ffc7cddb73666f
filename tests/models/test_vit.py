"""Laws of ViT: the plain formula on patches, every patch is seen, narrower ones never exceed the size asked for."""

import math
from itertools import pairwise

import pytest
import torch
from torch import nn

import dynarank
from dynarank.factorize import deployed_parameters
from dynarank.models.vit import Block, ViT, vit_parameters

SMALL = {"layers": 2, "heads": 2, "width": 6, "image": 8, "patch": 4}


def test_the_count_is_the_formula_by_hand():
    block = 4 * (192 * 192 + 192) + (192 * 768 + 768) + (768 * 192 + 192) + 2 * 2 * 192
    patches, positions, norm, head = 48 * 192 + 192, 64 * 192, 2 * 192, 192 * 10 + 10
    assert deployed_parameters(ViT()) == patches + positions + 6 * block + norm + head == 2_693_194


@pytest.mark.parametrize(("heads", "width", "mlp_ratio"), [(1, 1, 4), (3, 6, 1.5), (2, 10, 0.3)])
def test_the_formula_counts_every_parameter(heads: int, width: int, mlp_ratio: float):
    shape = {"image": 9, "patch": 3, "channels": 2, "classes": 7}
    model = ViT(layers=3, heads=heads, width=width, mlp_ratio=mlp_ratio, **shape)
    assert vit_parameters(layers=3, width=width, hidden=model.hidden, **shape) == deployed_parameters(model)
    assert model(torch.zeros(5, 2, 9, 9)).shape == (5, 7)


def test_every_matrix_has_a_readable_name():
    layers = [name for name, m in ViT(**SMALL).named_modules() if isinstance(m, nn.Linear | nn.Conv2d)]
    kinds = ("query", "key", "value", "out", "up", "down")
    assert layers == ["patches", *(f"blocks.{block}.{kind}" for block in range(2) for kind in kinds), "head"]


def normalised(x: torch.Tensor) -> torch.Tensor:
    return (x - x.mean(-1, keepdim=True)) / torch.sqrt(x.var(-1, keepdim=True, correction=0) + 1e-5)


def by_hand(block: Block, features: torch.Tensor) -> torch.Tensor:
    x = normalised(features)
    heads = []
    for columns in (slice(0, 3), slice(3, 6)):
        query, key, value = (layer(x)[..., columns] for layer in (block.query, block.key, block.value))
        heads.append((query @ key.mT / math.sqrt(3)).softmax(-1) @ value)
    features = features + block.out(torch.cat(heads, -1))
    hidden = block.up(normalised(features))
    return features + block.down(hidden * (1 + torch.erf(hidden / math.sqrt(2))) / 2)


def test_it_is_the_plain_formula():
    model = ViT(**SMALL).double()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(10)
        for norm in (m for m in model.modules() if isinstance(m, nn.LayerNorm)):
            nn.init.ones_(norm.weight)
    images = torch.randn(3, 3, 8, 8, dtype=torch.float64)
    corners = [(0, 0), (0, 4), (4, 0), (4, 4)]
    patches = torch.stack([images[:, :, y : y + 4, x : x + 4].flatten(1) for y, x in corners], 1)  # (3, 4, 48)
    features = patches @ model.patches.weight.flatten(1).mT + model.patches.bias + model.positions.weight
    for block in model.blocks:
        features = by_hand(block, features)  # type: ignore[arg-type]
    expected = normalised(features).mean(1) @ model.head.weight.mT + model.head.bias
    torch.testing.assert_close(model(images), expected)
    swapped = torch.cat([images[:, :, 4:], images[:, :, :4]], 2)
    assert (model(swapped) - expected).abs().max() > 1e-3  # positions matter


def test_every_pixel_changes_the_logits():
    model = ViT(**SMALL).double()
    images = torch.randn(1, 3, 8, 8, dtype=torch.float64, requires_grad=True)
    model(images).square().sum().backward()
    assert images.grad is not None and images.grad.all()


def test_the_branches_start_smaller_the_deeper_the_network():
    model = ViT(layers=8, width=66)
    for name, parameter in model.named_parameters():
        if parameter.dim() == 2:
            deviation = 0.02 / 4 if name.endswith(("out.weight", "down.weight")) else 0.02
            torch.testing.assert_close(parameter.std().item(), deviation, atol=0, rtol=0.1)
        elif name.endswith("bias"):
            assert not parameter.any()


@pytest.mark.parametrize("share", [0.02, 0.05, 0.1, 0.2, 0.33, 0.5, 0.8, 0.95])
def test_narrower_never_exceeds_and_comes_close(share: float):
    model = ViT()
    parameters = int(share * deployed_parameters(model))
    narrower = model.narrower(parameters)
    assert 0.98 * parameters < deployed_parameters(narrower) <= parameters
    assert (narrower.layers, narrower.heads, narrower.image, narrower.patch) == (6, 6, 32, 4)
    assert narrower.width <= 192 and 4 * narrower.width <= narrower.hidden <= 768
    again = model.narrower(parameters)
    assert (again.width, again.hidden) == (narrower.width, narrower.hidden)


def test_narrower_grows_with_the_size_asked_for():
    model = ViT(layers=2, heads=3, width=24, image=8, mlp_ratio=2.5, channels=1, classes=3)
    counts = [deployed_parameters(model.narrower(parameters)) for parameters in range(500, 9_000, 100)]
    assert all(before <= after for before, after in pairwise(counts))


@pytest.mark.parametrize("mlp_ratio", [4, 1.7, 0.1])
def test_narrower_is_the_model_itself_at_its_own_count_and_beyond(mlp_ratio: float):
    model = ViT(**SMALL, mlp_ratio=mlp_ratio, channels=1, classes=3)
    for parameters in (deployed_parameters(model), 10**9):
        narrower = model.narrower(parameters)
        assert (narrower.width, narrower.hidden, narrower.channels, narrower.classes) == (6, model.hidden, 1, 3)


def test_narrower_names_the_smallest_size():
    smallest = deployed_parameters(ViT(width=6))
    assert ViT().narrower(smallest).width == 6
    with pytest.raises(ValueError, match=f"parameters must be at least {smallest}, got {smallest - 1}"):
        ViT().narrower(smallest - 1)


def test_every_matrix_but_the_head_can_be_factorised():
    model = ViT(**SMALL)
    report = dynarank.factorize_(model, rank=2)
    assert {entry.name for entry in report.entries if entry.rank is None} == {"positions", "head"}
    assert model(torch.zeros(2, 3, 8, 8)).shape == (2, 10)


def test_positions_can_be_factorised_if_they_are_named():
    model = ViT(layers=1, heads=2, width=16)
    dynarank.factorize_(model, rank=2, target_modules=["positions"])
    assert model.positions.rank == 2
    model(torch.randn(2, 3, 32, 32)).square().sum().backward()
    assert model.positions.A.grad.any() and model.positions.B.grad.any()


def test_it_exports_as_one_graph():
    model = ViT(**SMALL).eval()
    images = torch.randn(2, 3, 8, 8)
    torch.testing.assert_close(torch.export.export(model, (images,)).module()(images), model(images))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"width": 190}, "width must be a multiple of heads = 6, got 190"),
        ({"image": 30}, "image must be a multiple of patch = 4, got 30"),
    ],
)
def test_sizes_that_do_not_divide_are_refused(options: dict, message: str):
    with pytest.raises(ValueError, match=message):
        ViT(**options)


@pytest.mark.parametrize("name", ["layers", "heads", "width", "mlp_ratio", "image", "patch", "channels", "classes"])
def test_empty_sizes_are_refused(name: str):
    with pytest.raises(ValueError, match=f"{name}.* must be at least 1, got 0"):
        ViT(**{name: 0})
