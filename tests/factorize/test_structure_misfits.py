"""A structure that does not fit a model is refused, and the model is left as it is."""

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

from dynarank.factorize import factorize_
from dynarank.factorize.structure import restructure_, structure
from dynarank.layers.conv2d import LowRankConv2d
from dynarank.layers.linear import LowRankLinear


def assert_unchanged(model: nn.Module, attempt: Callable[[], object], message: str) -> None:
    modules, state = dict(model.named_modules()), copy.deepcopy(model.state_dict())
    with pytest.raises(ValueError, match=message):
        attempt()
    assert dict(model.named_modules()) == modules
    torch.testing.assert_close(dict(model.state_dict()), dict(state), rtol=0, atol=0)


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.one, self.two = nn.Linear(6, 6), nn.Linear(6, 6)
        self.two.weight = self.one.weight


MISFITS: dict[str, tuple[Callable[[], nn.Module], str]] = {
    "no such layer": (lambda: nn.Sequential(nn.Linear(6, 6)), "1 of 1 layers are not in the model: 'one'"),
    "other sizes": (
        lambda: nn.ModuleDict({"one": nn.Linear(7, 6)}),
        "'one' has in_features 6 in the .* 7 in the model",
    ),
    "no bias": (lambda: nn.ModuleDict({"one": nn.Linear(6, 6, bias=False)}), "'one' has bias True .* False"),
    "another type": (lambda: nn.ModuleDict({"one": nn.Conv1d(6, 6, 1)}), "'one' has type Linear .* Conv1d"),
    "no layer at all": (lambda: nn.ModuleDict({"one": nn.ReLU()}), "1 of 1 layers are not in the model"),
    "a tied weight": (Tied, "'one' cannot be replaced: its weight is tied to 'two'"),
    "more low rank": (
        lambda: nn.ModuleDict({"one": nn.Linear(6, 6), "two": LowRankLinear(6, 6, rank=1)}),
        "the model has low-rank layers of its own: 'two'",
    ),
}


@pytest.mark.parametrize("case", MISFITS)
def test_a_model_that_does_not_fit_is_left_as_it_is(case: str):
    build, message = MISFITS[case]
    model = build()
    saved = structure(nn.ModuleDict({"one": LowRankLinear(6, 6, rank=2)}))
    assert_unchanged(model, lambda: restructure_(model, saved), message)


def test_a_chain_that_does_not_fit_is_refused():
    chain = nn.Sequential(nn.Conv2d(3, 2, 1, bias=False), LowRankConv2d(2, 8, 5, stride=2, rank=2))
    saved = structure(nn.ModuleDict({"conv": chain}))
    model = nn.ModuleDict({"conv": nn.Conv2d(3, 8, 3, stride=2)})
    message = r"'conv' has window \[5, 5\] in the structure and \[3, 3\] in the model"
    assert_unchanged(model, lambda: restructure_(model, saved), message)


def test_a_layer_that_is_used_twice_must_be_one():
    layer = nn.Linear(6, 6)
    saved = nn.Sequential(layer, nn.ReLU(), layer)
    factorize_(saved, rank=2, include_head=True)
    model = nn.Sequential(nn.Linear(6, 6), nn.ReLU(), nn.Linear(6, 6))
    message = r"'0' has names \['0', '2'\] in the structure and \['0'\] in the model"
    assert_unchanged(model, lambda: restructure_(model, structure(saved)), message)


def test_the_model_itself_is_not_replaced():
    layer = LowRankLinear(6, 6, rank=2)
    restructure_(layer, structure(layer))
    saved = structure(LowRankLinear(6, 6, rank=3))
    for model in (layer, nn.Linear(6, 6)):
        assert_unchanged(model, lambda model=model: restructure_(model, saved), "it is the model itself")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"kind": "wardrobe"}, "unknown kind of layer 'wardrobe'. Available: conv1d"),
        ({"dtype": "float33"}, "malformed: AttributeError"),
        ({"dtype": "nn"}, "malformed: TypeError"),
        ({"stored": 3}, "malformed: TypeError"),
        ({"rank": 9, "stored": [9, 9]}, "rank must be between 1 and"),
        ({"options": {"size": 6}}, "'one' has size 6 in the structure"),
        ({"options": None}, "malformed: TypeError"),
    ],
)
def test_a_structure_that_makes_no_sense_is_refused(change: dict[str, Any], message: str):
    saved = structure(nn.ModuleDict({"one": LowRankLinear(6, 6, rank=2)}))
    saved["one"] |= change
    model = nn.ModuleDict({"one": nn.Linear(6, 6)})
    assert_unchanged(model, lambda: restructure_(model, saved), message)


def test_a_low_rank_layer_of_unknown_class_is_named():
    class Mine(LowRankLinear):
        pass

    with pytest.raises(TypeError, match=r"structure: Mine is no kind of layer\. Available: conv1d, "):
        structure(nn.Sequential(Mine(6, 6, rank=2)))
