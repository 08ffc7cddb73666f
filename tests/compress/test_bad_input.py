"""What cannot be compressed is refused with one clear message, and the model is as it was, to the last bit."""

import warnings
from collections import OrderedDict
from typing import Any

import numpy
import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

from dynarank.compress import Compressor, compress_, renew_statistics_
from dynarank.factorize import deployed_parameters
from dynarank.layers.base import low_rank_layers
from dynarank.layers.linear import LowRankLinear


class Small(nn.Module):
    """Batch normalisation, a frozen layer, a part in evaluation mode, hooks: whatever could get lost."""

    def __init__(self) -> None:
        super().__init__()
        self.fc1 = nn.Linear(20, 24)
        self.norm = nn.BatchNorm1d(24, momentum=0.3)
        self.fc2 = nn.Linear(24, 20)
        self.drop = nn.Dropout(0.5)
        self.head = nn.Linear(20, 4)
        self.fc2.weight.requires_grad_(False)
        self.norm.eval()
        self.fc1.register_forward_hook(lambda *_: None)
        self.fc2.register_forward_pre_hook(lambda *_: None)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.drop(self.fc2(self.norm(self.fc1(x)).relu()).relu()))


@pytest.fixture
def model() -> Small:
    return Small()


GOOD = [torch.linspace(-1, 1, 120).reshape(6, 20)]
NAN = [GOOD[0], GOOD[0].index_fill(0, torch.tensor([2]), torch.nan)]
BUDGET = r"budget must be a fraction in \(0, 1\] or a number above 1, got "


@pytest.mark.parametrize("measure", ["parameters", "flops", "latency"])
@pytest.mark.parametrize(
    "budget", [0, 0.0, -0.5, -3, torch.nan, torch.inf, -torch.inf, True, False, None, "0.5", [0.5]]
)
def test_a_budget_is_a_positive_number(model: Any, state_of: Any, budget: Any, measure: str):
    before = state_of(model)
    with pytest.raises(ValueError, match=BUDGET):
        compress_(model, budget, measure=measure, calibration=GOOD)
    assert state_of(model) == before


@pytest.mark.parametrize("budget", [numpy.float32(0.7), numpy.float64(0.7), numpy.int64(1000)])
def test_numbers_of_numpy_are_numbers(model: Any, budget: Any):
    report = compress_(model, budget, calibration=GOOD)
    assert deployed_parameters(model) <= report.budget < report.parameters_before


def test_a_bad_budget_is_told_before_the_model_is_looked_at(model: Any):
    def forward(model: nn.Module, batch: Any) -> Any:
        raise AssertionError

    with pytest.raises(ValueError, match=BUDGET):
        compress_(model, -1, calibration=GOOD, forward=forward)
    with pytest.raises(ValueError, match=r"unknown measure 'speed'. Available: bytes, flops, latency, parameters."):
        compress_(model, 0.5, measure="speed", calibration=GOOD, forward=forward)


def test_latency_is_a_fraction(model: Any, state_of: Any):
    before = state_of(model)
    with pytest.raises(ValueError, match=r"a budget of latency must be a fraction in \(0, 1\], got 2\."):
        compress_(model, 2, measure="latency", calibration=GOOD)
    assert state_of(model) == before


CALIBRATIONS: dict[str, tuple[Any, type[Exception], str]] = {
    "a tensor": (
        GOOD[0],
        TypeError,
        r"calibration must be a list of batches or a DataLoader, got Tensor. Pass \[batch\]",
    ),
    "a mapping": ({"x": GOOD[0]}, TypeError, r"got dict. Pass \[batch\] for a single one"),
    "a number": (3, TypeError, "calibration must be a list of batches or a DataLoader, got int"),
    "text": ("data", TypeError, "calibration must be a list of batches or a DataLoader, got str"),
    "nothing": ([], ValueError, "calibration holds no batch. Pass at least one, or None."),
    "an iterator at its end": (iter([]), ValueError, "calibration holds no batch"),
    "a wrong shape": ([torch.ones(6, 21)], ValueError, r"batch 0 of shape \(6, 21\) does not fit the model: mat1"),
    "a wrong shape later": (
        [*GOOD, torch.ones(6, 21)],
        ValueError,
        r"batch 1 of shape \(6, 21\) does not fit the model",
    ),
    "a wrong kind": ([None], TypeError, "a batch must be a tensor, a mapping, or a tuple or list"),
    "a wrong keyword": ([{"y": GOOD[0]}], TypeError, "unexpected keyword argument 'y'"),
    "a wrong type": ([GOOD[0].double()], ValueError, "does not fit the model: .* same dtype"),
    "NaN": (NAN, ValueError, "fc1: the input holds NaN or infinity in calibration batch 1"),
    "one value per channel": (
        [*GOOD, GOOD[0][:1]],
        ValueError,
        r"batch 1 of shape \(1, 20\) .* renew_statistics=False",
    ),
}


@pytest.mark.parametrize(("calibration", "kind", "message"), CALIBRATIONS.values(), ids=CALIBRATIONS.keys())
def test_bad_calibration_is_refused(model: Any, state_of: Any, calibration: Any, kind: Any, message: str):
    before = state_of(model)
    with pytest.raises(kind, match=message):
        compress_(model, 0.6, calibration=calibration)
    assert state_of(model) == before


@pytest.mark.parametrize("where", ["a weight", "a bias", "statistics", "calibration", "the factors"])
@pytest.mark.parametrize("value", [torch.nan, -torch.inf])
@pytest.mark.parametrize("method", ["activation_aware", "svd"])
def test_what_is_not_finite_is_refused(model: Any, state_of: Any, where: str, value: float, method: str):
    calibration = list(GOOD)
    if where == "calibration":
        calibration = [torch.full((6, 20), value)]
    elif where == "the factors":
        model.fc2 = LowRankLinear.from_dense(model.fc2, rank=5)
        model.fc2.A.data[0, 0] = value
    else:
        tensor = {"a weight": model.fc1.weight, "a bias": model.fc1.bias, "statistics": model.norm.running_var}[where]
        tensor.data.view(-1)[3] = value
    before = str(state_of(model))  # text, since NaN is not equal to itself
    with pytest.raises(ValueError, match=r"NaN or infinity|finite"):
        compress_(model, 0.6, calibration=calibration, method=method)
    assert str(state_of(model)) == before


def test_a_weight_that_is_not_finite_is_named_and_may_be_left_out(model: Any):
    model.fc2.weight.data[0, 0] = torch.nan
    with pytest.raises(ValueError, match=r"fc2: its weights hold NaN or infinity. The model is unchanged."):
        compress_(model, 0.6)
    compress_(model, 0.8, exclude_modules=["fc2"])
    assert set(low_rank_layers(model)) == {"fc1"}


# --- models that cannot be compressed ----------------------------------------------------------------------------


def test_weights_on_the_meta_device_are_refused(state_of: Any):
    model = Small().to("meta")
    before = state_of(model)
    with pytest.raises(
        ValueError, match=r"'fc1.weight' and 7 more parameters are on the meta device. Load the trained"
    ):
        compress_(model, 0.5)
    assert state_of(model) == before


NOTHING: dict[str, tuple[nn.Module, str]] = {
    "no layer": (nn.Sequential(nn.ReLU()), "It has no layer with a weight matrix."),
    "an embedding": (nn.Sequential(nn.Embedding(9, 9)), r"Of 1 layers: 0 \(an embedding: its rows are looked up"),
    "a recurrent cell": (nn.ModuleDict({"cell": nn.GRU(9, 9)}), r"cell \(GRU has no low-rank twin\)"),
    "groups": (nn.ModuleDict({"conv": nn.Conv2d(8, 8, 3, groups=2)}), r"conv \(grouped convolution \(groups=2\)\)"),
    "a layer alone": (nn.Linear(20, 20), "it is the model itself, which cannot be replaced in place; wrap it in"),
    "a low-rank layer alone": (LowRankLinear(20, 20, rank=5), "it is the model itself, which cannot be replaced in"),
    "rank 1 already": (nn.Sequential(LowRankLinear(20, 20, rank=1), nn.ReLU()), "no replacement would hold fewer"),
    "a thin layer": (nn.ModuleDict({"thin": nn.Linear(1, 20), "more": nn.Linear(20, 1)}), "too small: no replacement"),
    "not initialised": (nn.ModuleDict({"lazy": nn.LazyLinear(20)}), "lazy: its shape is not known before the first"),
    "only a head": (nn.Sequential(nn.Linear(20, 20), nn.ReLU()), "classifier head, the only layer"),
}


@pytest.mark.filterwarnings("ignore:Lazy modules:UserWarning")
@pytest.mark.parametrize(("module", "message"), NOTHING.values(), ids=NOTHING.keys())
def test_a_model_with_nothing_to_replace_says_why(module: nn.Module, message: str):
    options = {} if "head" in message else {"include_head": True}
    layers = [id(one) for one in module.modules()]
    with pytest.raises(ValueError, match=f"compress_ can replace no layer. .*{message}"):
        compress_(module, 0.5, **options)
    assert [id(one) for one in module.modules()] == layers


@pytest.mark.filterwarnings("ignore:Lazy modules:UserWarning")
def test_layers_without_a_shape_do_not_stop_the_others():
    model = nn.ModuleDict({"lazy": nn.LazyLinear(20), "fc": nn.Linear(20, 20), "head": nn.Linear(20, 4)})
    report = compress_(model, 0.7)
    assert set(low_rank_layers(model)) == {"fc"}
    assert report.layers[0].reason.startswith("lazy")


def test_quantised_layers_are_no_layers_with_a_weight(batches: Any):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch.ao announces its end
        model: Any = torch.ao.quantization.quantize_dynamic(Small().eval(), {nn.Linear})
    with pytest.raises(ValueError, match="can replace no layer"):
        compress_(model, 0.5, calibration=GOOD)
    assert model(GOOD[0]).shape == (6, 4)


def test_weights_of_integers_are_left(batches: Any):
    model: Any = nn.Sequential(OrderedDict(fc=nn.Linear(20, 20), whole=nn.Linear(20, 20), head=nn.Linear(20, 4)))
    model.whole.weight = nn.Parameter(torch.ones(20, 20, dtype=torch.int8), requires_grad=False)
    report = compress_(model, 0.8)
    assert report.layers[1].reason == "weights of dtype torch.int8 are not supported"
    assert set(low_rank_layers(model)) == {"fc"}


def test_a_wrapped_model_is_refused(tmp_path: Any):
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        model = nn.parallel.DistributedDataParallel(nn.Sequential(nn.Linear(20, 20), nn.ReLU(), nn.Linear(20, 4)))
        with pytest.raises(RuntimeError, match=r"compress_ found DistributedDataParallel, .* Wrap after compress_."):
            compress_(model, 0.5)
    finally:
        dist.destroy_process_group()


# --- options -----------------------------------------------------------------------------------------------------

OPTIONS: list[tuple[dict[str, Any], str]] = [
    ({"method": "pca"}, "unknown method 'pca'. Available: activation_aware, svd."),
    ({"method": "activation_aware"}, "method 'activation_aware' needs calibration data. Pass them, or method='svd'."),
    ({"forms": ["square"]}, "unknown form 'square'. Available: .*matrix"),
    ({"forms": []}, "forms is empty. Leave it out for all."),
    ({"rank_multiple": 0}, "rank_multiple must be at least 1, got 0."),
    ({"target_modules": ["fc9"]}, "target_modules: 'fc9' matches no layer. Did you mean 'fc"),
    ({"exclude_modules": ["fc9"]}, "exclude_modules: 'fc9' matches no layer"),
    ({"measure": "flops"}, "a budget of flops needs calibration data"),
    ({"measure": "latency"}, "timing layers needs calibration data"),
    ({"faster_only": True}, "timing layers needs calibration data"),
    ({"measure": "latency", "timed": 0.0, "calibration": GOOD}, "latency needs timed layers"),
    ({"faster_only": True, "timed": 0.0, "calibration": GOOD}, "faster_only needs timed layers"),
    ({"timed": -1.0, "calibration": GOOD}, "seconds must be at least 0, got -1.0"),
    ({"renew_statistics": True}, "renew_statistics needs calibration data"),
]


@pytest.mark.parametrize(("options", "message"), OPTIONS)
def test_bad_options_are_refused(model: Any, state_of: Any, options: dict[str, Any], message: str):
    before = state_of(model)
    with pytest.raises(ValueError, match=message):
        compress_(model, 0.6, **options)
    assert state_of(model) == before


@pytest.mark.parametrize("wrap", [lambda y: None, lambda y: y.argmax(-1), lambda y: y * torch.nan])
def test_outputs_that_tell_nothing_are_refused(state_of: Any, wrap: Any):
    model = nn.ModuleDict({"fc": nn.Linear(20, 20), "head": nn.Linear(20, 4)})
    forward = lambda model, x: wrap(model["head"](model["fc"](x)))  # noqa: E731
    before = state_of(model)
    with pytest.raises(ValueError, match=r"hold no finite floating-point number. .* or measured_sensitivity=False"):
        compress_(model, 0.6, calibration=GOOD, forward=forward)
    assert state_of(model) == before
    compress_(model, 0.7, calibration=GOOD, forward=forward, measured_sensitivity=False)
    assert set(low_rank_layers(model)) == {"fc"}


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_a_divergence_that_is_not_finite_is_refused(model: Any, state_of: Any, value: float):
    before = state_of(model)
    with pytest.raises(ValueError, match=f"divergence of the model's outputs must be finite, got {value}"):
        compress_(model, 0.6, calibration=GOOD, divergence=lambda before, now: torch.tensor(value))
    assert state_of(model) == before


@pytest.mark.parametrize("call", ["survey", "last", "statistics"])
def test_whatever_the_model_raises_is_passed_on_and_leaves_it_as_it_was(model: Any, state_of: Any, call: str):
    passes = {"survey": 1, "last": 7, "statistics": 1}[call]
    counts = {"now": 0}

    def forward(model: nn.Module, batch: Tensor) -> Any:
        counts["now"] += 1
        if counts["now"] == passes:
            raise KeyError("mine")
        return model(batch)

    before = state_of(model)
    with pytest.raises(KeyError, match="mine"):
        if call == "statistics":
            renew_statistics_(model, GOOD, forward=forward)
        else:
            Compressor(model, calibration=GOOD, forward=forward)
    assert counts["now"] == passes
    assert state_of(model) == before
