"""What cannot be replaced safely stays dense, and the report says why."""

import copy
import functools
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrizations, parametrize, prune

from dynarank.factorize import factorize_, merge_
from dynarank.layers.linear import LowRankLinear


def pair() -> Any:
    """Two layers that are replaced, unless something is done to the first."""
    return nn.ModuleDict({"a": nn.Linear(16, 16), "b": nn.Linear(16, 16)})


def reason(model: nn.Module, name: str = "a") -> str:
    """Factorise and return why ``name`` stays dense; the other layer must have been replaced."""
    before = model.get_submodule(name)
    report = factorize_(model, include_head=True)
    assert model.get_submodule(name) is before and "b" in [entry.name for entry in report.factorized]
    return next(entry.reason for entry in report.kept_dense if entry.name == name)


class MyLinear(nn.Linear):
    def forward(self, input: Tensor) -> Tensor:
        return super().forward(input).relu()


class Symmetric(nn.Module):
    def forward(self, X: Tensor) -> Tensor:
        return X + X.mT


def old_style(name: str) -> Callable[[Any], Any]:
    def apply(layer: Any) -> Any:
        with warnings.catch_warnings(action="ignore"):
            getattr(nn.utils, name)(layer)

    return apply


def lend(layer: Any, **attributes: Any) -> None:
    vars(layer).update(attributes)


CHANGES: dict[str, tuple[Callable[[Any], Any], str]] = {
    "parametrization": (lambda m: parametrize.register_parametrization(m, "weight", Symmetric()), "parametrizations"),
    "weight_norm": (parametrizations.weight_norm, "parametrizations, which would be lost"),
    "spectral_norm": (parametrizations.spectral_norm, "parametrizations, which would be lost"),
    "orthogonal": (parametrizations.orthogonal, "parametrizations, which would be lost"),
    "old weight_norm": (old_style("weight_norm"), "its weight is computed from other tensors"),
    "old spectral_norm": (old_style("spectral_norm"), "its weight is computed from other tensors"),
    "pruning": (lambda m: prune.l1_unstructured(m, "weight", 0.5), "its weight is computed from other tensors"),
    "buffer": (lambda m: m.register_buffer("scale", torch.ones(1)), "it holds more than weight and bias: scale"),
    "child": (lambda m: m.add_module("extra", nn.Linear(2, 2)), "it holds more than weight and bias: extra"),
    "forward": (lambda m: lend(m, forward=lambda x: x), "its forward method was replaced on the instance"),
    "factor": (lambda m: lend(m, A=3), "its attribute 'A' means something else in a low-rank layer"),
    "attribute": (lambda m: lend(m, rank=3), "its attribute 'rank' means something else in a low-rank layer"),
    "gradient hook": (lambda m: m.weight.register_hook(lambda grad: grad), "its weight has gradient hooks"),
    "accumulate hook": (
        lambda m: m.weight.register_post_accumulate_grad_hook(lambda p: None),
        "its weight has gradient hooks",
    ),
    "state hook": (lambda m: m.register_state_dict_pre_hook(lambda *args: None), "it has state-dict hooks"),
    "load hook": (lambda m: m.register_load_state_dict_pre_hook(lambda *args: None), "it has state-dict hooks"),
    "complex": (
        lambda m: m.register_parameter("weight", nn.Parameter(m.weight.detach().to(torch.complex64))),
        "weights of dtype torch.complex64 are not supported",
    ),
}


@pytest.mark.parametrize(("change", "why"), CHANGES.values(), ids=CHANGES.keys())
def test_a_changed_layer_stays_dense(change: Callable[[Any], Any], why: str):
    model = pair()
    change(model["a"])
    assert why in reason(model)


@pytest.mark.parametrize(
    ("layer", "why"),
    [
        (MyLinear(16, 16), "MyLinear is a subclass of Linear and may compute something else"),
        (nn.LazyLinear(16), "lazy: its shape is not known before the first forward pass"),
        (nn.LazyConv2d(16, 3), "lazy: its shape is not known before the first forward pass"),
        (nn.Conv2d(16, 16, 3, groups=4), "grouped convolution (groups=4)"),
        (nn.EmbeddingBag(16, 16), "EmbeddingBag has no low-rank twin"),
        (nn.ConvTranspose2d(16, 16, 3), "ConvTranspose2d has no low-rank twin"),
        (nn.Bilinear(4, 4, 16), "Bilinear has no low-rank twin"),
        (nn.LSTM(16, 16), "LSTM has no low-rank twin"),
    ],
)
def test_a_layer_without_a_twin_stays_dense(layer: nn.Module, why: str):
    assert reason(nn.ModuleDict({"a": layer, "b": nn.Linear(16, 16)})) == why


def test_an_empty_weight_stays_dense():
    with warnings.catch_warnings(action="ignore"):
        layer = nn.Linear(0, 16)
    assert reason(nn.ModuleDict({"a": layer, "b": nn.Linear(16, 16)})) == "its weight is empty"


def test_lazy_modules_print_and_count():
    model = nn.ModuleDict({"a": nn.LazyLinear(16), "b": nn.Linear(16, 16)})
    report = factorize_(model, include_head=True)
    entry = report.kept_dense[0]
    assert (entry.shape, entry.before) == (None, 0) and " ? " in str(report)
    assert report.before == 272


def test_a_bare_parameter_is_listed():
    model = pair()
    model.register_parameter("position", nn.Parameter(torch.zeros(3, 4, 5)))
    report = factorize_(model, include_head=True)
    entry = report.kept_dense[0]
    assert (entry.name, entry.shape, entry.reason) == ("position", (3, 20), "ModuleDict has no low-rank twin")


# --- tied and shared -------------------------------------------------------------------------------------------------


def test_tied_weights_stay_dense_and_name_their_partner():
    model = nn.ModuleDict({"a": nn.Linear(16, 16), "twin": nn.Linear(16, 16), "b": nn.Linear(16, 16)})
    model["twin"].weight = model["a"].weight
    other = copy.deepcopy(model)
    assert reason(model) == "its weight is tied to 'twin'"
    assert reason(other, "twin") == "its weight is tied to 'a'"
    assert model["a"].weight is model["twin"].weight


@pytest.mark.parametrize(
    "tie", [lambda W: W, lambda W: nn.Parameter(W.data), lambda W: nn.Parameter(W.data.t())], ids=["same", "data", "t"]
)
def test_one_memory_under_two_parameters_is_tied(tie: Any):
    model = pair()
    model["tokens"] = nn.Embedding(16, 16)
    model["tokens"].weight = tie(model["a"].weight)
    assert reason(model) == "its weight is tied to 'tokens'"


def test_a_weight_under_a_second_name_is_tied():
    model = pair()
    model.register_parameter("alias", model["a"].weight)
    assert reason(model) == "its weight is tied to 'alias'"


def test_tied_biases_stay_tied():
    model = pair()
    model["a"].bias = model["b"].bias
    report = factorize_(model, include_head=True)
    assert len(report.factorized) == 2 and model["a"].bias is model["b"].bias


def test_a_shared_module_is_replaced_once_at_every_place():
    layer = nn.Linear(16, 16)
    model = nn.ModuleDict({"x": nn.Sequential(layer, nn.ReLU()), "y": nn.ModuleList([layer])})
    report = factorize_(model, rank=2, target_modules=["y.0"])
    assert isinstance(model["x"][0], LowRankLinear) and model["x"][0] is model["y"][0]
    (entry,) = report.factorized
    assert entry.name == "x.0" and entry.note == "shared by x.0, y.0"
    assert report.after == 2 * 32 + 16
    merge_(model)
    assert type(model["x"][0]) is nn.Linear and model["x"][0] is model["y"][0]


# --- references outside the registered submodules --------------------------------------------------------------------


@pytest.mark.parametrize(
    "hold",
    [
        lambda layer: [layer],
        lambda layer: {"first": (layer,)},
        lambda layer: layer.forward,
        lambda layer: (torch.relu, layer),
    ],
)
def test_a_layer_that_is_held_elsewhere_stays_dense(hold: Callable[[Any], Any]):
    model = pair()
    lend(model, order=hold(model["a"]))
    assert reason(model) == "attribute 'order' of the model also holds it, outside the registered submodules"


def test_the_holder_is_named():
    model = pair()
    model["holder"] = nn.Identity()
    lend(model["holder"], mate=model["a"])
    assert reason(model).startswith("attribute 'mate' of 'holder' also holds it")


# --- what is carried over --------------------------------------------------------------------------------------------


def test_hooks_move_to_the_new_layer_and_back():
    model = nn.Sequential(nn.Linear(16, 16), nn.Linear(16, 4))
    seen: list[Any] = []
    handles = [
        model[0].register_forward_pre_hook(lambda m, args: seen.append(("pre", type(m)))),
        model[0].register_forward_hook(lambda m, args, kwargs, y: seen.append(("post", type(m))), with_kwargs=True),
        model[0].register_forward_hook(lambda m, args, y: 2 * y, always_call=True),
        model[0].register_full_backward_hook(lambda m, dx, dy: seen.append(("back", type(m)))),
    ]
    factorize_(model, rank="full")
    for cls in (LowRankLinear, nn.Linear):
        assert type(model[0]) is cls
        x = torch.randn(3, 16, requires_grad=True)
        y = model(x)
        torch.testing.assert_close(y, model[1](2 * nn.functional.linear(x, model[0].weight + 0, model[0].bias)))
        y.sum().backward()
        assert seen == [("pre", cls), ("post", cls), ("back", cls)]
        seen.clear()
        if cls is LowRankLinear:
            merge_(model)
    for handle in handles:
        handle.remove()
    model(torch.randn(3, 16))
    assert not seen and not model[0]._forward_hooks


def test_attributes_set_by_the_user_are_carried_over_and_back():
    model = pair()
    model["a"].tag = {"anything": 1}
    model["a"].loader = functools.partial(int)
    factorize_(model, include_head=True)
    assert model["a"].tag == {"anything": 1} and isinstance(model["a"].loader, functools.partial)
    merge_(model)
    assert model["a"].tag == {"anything": 1}
    assert set(vars(model["a"])) == set(vars(nn.Linear(2, 2))) | {"tag", "loader"}


def test_a_model_wrapped_for_distributed_training_is_refused():
    wrapped = nn.parallel.DistributedDataParallel.__new__(nn.parallel.DistributedDataParallel)
    nn.Module.__init__(wrapped)
    wrapped.module = pair()
    with pytest.raises(RuntimeError, match=r"factorize_ found DistributedDataParallel.* Wrap after factorize_"):
        factorize_(wrapped)
