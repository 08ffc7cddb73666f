"""A checkpoint gives back every bit, and a resumed run is the uninterrupted one."""

import copy
import json
import math
import struct
import tempfile
from collections import Counter, OrderedDict
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file
from torch import Tensor, nn

from dynarank.checkpoint import CheckpointInfo, load, load_model, save, save_model

DTYPES = [
    *("float64", "float32", "float16", "bfloat16", "complex128", "complex64", "complex32", "bool"),
    *("int64", "int32", "int16", "int8", "uint8", "uint16", "uint32", "uint64"),
    *("float8_e4m3fn", "float8_e5m2", "float8_e4m3fnuz", "float8_e5m2fnuz", "float8_e8m0fnu", "float4_e2m1fn_x2"),
]


def same(first: Any, second: Any) -> bool:
    """Whether two states are of the same types throughout, and equal bit for bit."""
    if type(first) is not type(second):
        return False
    if isinstance(first, Tensor):
        kinds = [(value.dtype, value.shape) for value in (first, second)]
        return kinds[0] == kinds[1] and bits(first) == bits(second)
    if isinstance(first, dict):
        return list(first) == list(second) and all(same(first[key], second[key]) for key in first)
    if isinstance(first, list | tuple):
        return len(first) == len(second) and all(map(same, first, second))
    if isinstance(first, float):
        return struct.pack("d", first) == struct.pack("d", second)
    return first == second


def bits(tensor: Tensor) -> bytes:
    values = tensor.detach().resolve_conj().resolve_neg().contiguous().flatten()
    return bytes((torch.view_as_real(values) if values.is_complex() else values).view(torch.uint8).flatten().tolist())


def through_disk(value: Any) -> Any:
    with tempfile.TemporaryDirectory() as directory:
        save(directory, value=value)
        return load(directory).extra["value"]


def from_bytes(content: bytes, dtype: torch.dtype) -> Tensor:
    return torch.frombuffer(bytearray(content or b"\0"), dtype=torch.uint8)[: len(content)].view(dtype)


numbers = st.integers() | st.floats(allow_subnormal=True)
tensors = st.builds(
    from_bytes,
    st.binary(max_size=32).map(lambda content: content[: len(content) // 8 * 8]),
    st.sampled_from([torch.float64, torch.float32, torch.bfloat16, torch.float16, torch.int16, torch.uint8]),
)
keys = st.text(max_size=4) | st.integers() | st.sampled_from(["$dict", "$tensor", "a/b", "~2"])
states = st.recursive(
    st.none() | st.booleans() | numbers | st.text() | tensors,
    lambda inner: (
        st.lists(inner, max_size=4)
        | st.lists(inner, max_size=4).map(tuple)
        | st.dictionaries(keys, inner, max_size=4)
        | st.dictionaries(keys, inner, max_size=4).map(OrderedDict)
    ),
    max_leaves=12,
)


@given(states)
@settings(max_examples=60)
def test_every_nested_state_comes_back(state):
    assert same(through_disk(state), state)


@pytest.mark.parametrize(
    "value",
    [-0.0, 5e-324, math.inf, -math.inf, math.nan, struct.unpack("d", b"\1\2\3\0\0\0\xf0\xff")[0], 10**5000,
     -(2**53) - 1, {10**5000: 1}, {1: "int", "1": "str"}, {}, [], (), Counter({3: 2}), "\0 \U0001f600"],
    ids=lambda value: type(value).__name__,
)  # fmt: skip
def test_awkward_values_come_back(value):
    assert same(through_disk([value]), [value])


@pytest.mark.filterwarnings("ignore:ComplexHalf")
@pytest.mark.parametrize("name", [name for name in DTYPES if hasattr(torch, name)])
def test_every_dtype_keeps_its_bits(name):
    dtype = getattr(torch, name)
    content = bytes([0, 1] * 128) if dtype == torch.bool else bytes(range(256))  # NaN payloads and denormals among them
    flat = from_bytes(content, dtype)
    state = {"flat": flat, "scalar": flat[3], "empty": flat[:0].reshape(0, 3), "columns": flat.reshape(8, -1)[:, ::2]}
    assert same(through_disk(state), state)


def test_layouts_and_lazy_bits_come_back():
    image = torch.randn(2, 3, 5, 7).to(memory_format=torch.channels_last)
    complex_values = torch.randn(4, dtype=torch.complex128)
    state = {"image": image, "expanded": torch.randn(3).expand(4, 3), "conj": complex_values.conj()}
    state |= {
        "neg": torch._neg_view(torch.ones(3)),
        "plain": complex_values,
        "parameter": nn.Parameter(torch.ones(2)).data,
    }
    loaded = through_disk(state)
    assert same(loaded, state)
    assert loaded["image"].stride() == image.stride()


def test_one_tensor_under_two_names_is_stored_once(tmp_path):
    weight = torch.randn(50, 50)
    save(tmp_path, tied={"a": weight, "b": weight, "part": weight[:2], "turned": weight.T}, other=weight)
    info = load(tmp_path, ignore=("global_generators",))
    tied = info.extra["tied"]
    assert tied["a"] is tied["b"] is not info.extra["other"]
    tied["a"].zero_()
    assert same(tied["part"], weight[:2])
    assert same(tied["turned"], weight.T)
    assert {"tied/a", "tied/part", "tied/turned", "other"} < set(info.manifest["tensors"])


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ({"a": [0, {1, 2}]}, "thing/a/1: a checkpoint cannot hold set"),
        ({"a": {(1, 2): 0}}, "thing/a: the key"),
        ({"a": {True: 0}}, "thing/a: the key True is a bool"),
        ({"a": b"bytes"}, "thing/a: a checkpoint cannot hold bytes"),
        ([torch.eye(2).to_sparse()], "thing/0: .*sparse.*to_dense"),
        ([torch.ones(1, device="meta")], "thing/0: .*meta"),
        ([torch.empty(1, dtype=torch.int4)], "thing/0: .*dtype torch.int4. Allowed: bfloat16"),
        ({"a": "\ud83d"}, "thing/a: the string .* not valid Unicode"),
        ({"\udc00": 1}, "not valid Unicode"),
        ({"a": math.floor}, "thing/a: .*builtin"),
    ],
)  # fmt: skip
@pytest.mark.filterwarnings("ignore")
def test_what_cannot_be_held_is_refused_by_path_before_writing(tmp_path, value, message):
    with pytest.raises(TypeError, match=message):
        save(tmp_path / "run", thing=value)
    assert not (tmp_path / "run").exists()


def test_a_state_that_holds_itself_is_refused(tmp_path):
    loop: list[Any] = []
    loop.append(loop)
    with pytest.raises(TypeError, match="holds itself"):
        save(tmp_path, loop=loop)


def test_names_in_the_files_are_readable(tmp_path):
    model = nn.Sequential(OrderedDict(fc1=nn.Linear(2, 3)))
    optimizer = torch.optim.Adam(model.parameters())
    model(torch.ones(2)).sum().backward()
    optimizer.step()
    save(tmp_path, step=5, model=model, optimizer=optimizer)
    [file] = tmp_path.glob("tensors-*")
    names = {"model/fc1.weight", "model/fc1.bias", "global_generators/cpu"}
    names |= {f"optimizer/state/{i}/{key}" for i in (0, 1) for key in ("step", "exp_avg", "exp_avg_sq")}
    found = load_file(file)
    assert set(found) == names
    assert same(found["model/fc1.weight"], model.state_dict()["fc1.weight"])
    manifest = json.loads((tmp_path / "manifest.json").read_text())
    assert manifest["tensors"]["model/fc1.weight"] == {"shape": [3, 2], "dtype": "float32"}
    assert (manifest["format"], manifest["version"], manifest["step"]) == ("dynarank.checkpoint", 1, 5)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["manifest.json", file.name]


def test_loaded_tensors_have_memory_of_their_own(tmp_path):
    values = torch.randn(10_000)
    save(tmp_path, values=values)
    [file] = tmp_path.glob("tensors-*")
    loaded = load(tmp_path).extra["values"]
    with file.open("r+b") as stream:
        stream.write(bytes(file.stat().st_size))
    assert same(loaded, values)


def test_every_tensor_starts_at_a_multiple_of_its_element(tmp_path):
    save(tmp_path, a=torch.ones(3, dtype=torch.uint8), b=torch.ones(3, dtype=torch.bfloat16), c=torch.ones(3).double())
    [file] = tmp_path.glob("tensors-*")
    content = file.read_bytes()
    length = int.from_bytes(content[:8], "little")
    header = json.loads(content[8 : 8 + length])
    starts = {name: 8 + length + header[name]["data_offsets"][0] for name in "abc"}
    assert starts["b"] % 2 == starts["c"] % 8 == 0


class Run:
    """A small training run with everything that has a state: dropout, batch norm, schedule, scaler, shuffled data."""

    def __init__(self, make_optimizer: Callable[..., torch.optim.Optimizer], seed: int) -> None:
        torch.manual_seed(seed)
        layers = [nn.Linear(5, 7), nn.BatchNorm1d(7), nn.Dropout(0.3), nn.Linear(7, 3)]
        self.model = nn.Sequential(*layers)
        self.optimizer = make_optimizer(self.model.parameters())
        self.scheduler = torch.optim.lr_scheduler.OneCycleLR(self.optimizer, max_lr=0.01, total_steps=20)
        self.scaler = torch.amp.GradScaler("cpu", init_scale=4.0, growth_interval=3)
        self.data = torch.Generator().manual_seed(seed)

    def train(self, steps: int) -> list[float]:
        losses = []
        for _ in range(steps):
            inputs = torch.randn(11, 5, generator=self.data)
            loss = self.model(inputs).square().mean()
            self.optimizer.zero_grad()
            self.scaler.scale(loss).backward()
            self.scaler.step(self.optimizer)
            self.scaler.update()
            self.scheduler.step()
            losses.append(loss.item())
        return losses

    def states(self) -> list[Any]:
        stateful = (self.model, self.optimizer, self.scheduler, self.scaler)
        return [copy.deepcopy(thing.state_dict()) for thing in stateful] + [self.data.get_state()]


@pytest.mark.parametrize(
    "make_optimizer",
    [
        lambda parameters: torch.optim.SGD(parameters, lr=0.1, momentum=0.9),
        lambda parameters: torch.optim.AdamW(parameters, lr=0.1),
        lambda parameters: torch.optim.AdamW(parameters, lr=0.1, fused=True),
        lambda parameters: torch.optim.AdamW(parameters, lr=torch.tensor(0.1), amsgrad=True),
    ],
    ids=["sgd", "adamw", "fused", "tensor_lr"],
)
def test_a_resumed_run_is_the_uninterrupted_run(tmp_path, make_optimizer):
    run = Run(make_optimizer, seed=1)
    run.train(7)
    save(tmp_path, step=7, **vars(run))
    losses = run.train(8)
    resumed = Run(make_optimizer, seed=2)
    assert load(tmp_path, **vars(resumed)).step == 7
    assert resumed.train(8) == losses
    assert same(resumed.states(), run.states())


OPTIMIZERS = [
    *("Adadelta", "Adafactor", "Adagrad", "Adam", "Adamax", "ASGD"),
    *("LBFGS", "NAdam", "RAdam", "RMSprop", "Rprop", "SGD"),
]
SCHEDULES: dict[str, Callable[..., Any]] = {
    "StepLR": lambda o, s: s.StepLR(o, 3),
    "MultiStepLR": lambda o, s: s.MultiStepLR(o, [3, 5]),
    "LambdaLR": lambda o, s: s.LambdaLR(o, lambda step: 0.9**step),
    "CyclicLR": lambda o, s: s.CyclicLR(o, 0.1, 0.2, step_size_up=3),
    "Cosine": lambda o, s: s.CosineAnnealingWarmRestarts(o, 4),
    "Plateau": lambda o, s: s.ReduceLROnPlateau(o, patience=1),
    "Sequential": lambda o, s: s.SequentialLR(o, [s.LinearLR(o), s.ExponentialLR(o, 0.9)], [4]),
    "Chained": lambda o, s: s.ChainedScheduler([s.PolynomialLR(o), s.ConstantLR(o)]),
}


def train_one(model: nn.Linear, optimizer: torch.optim.Optimizer, schedule: Any, steps: int) -> list[Tensor]:
    plateau = isinstance(schedule, torch.optim.lr_scheduler.ReduceLROnPlateau)
    for _ in range(steps):
        optimizer.zero_grad()
        model(torch.ones(3)).square().sum().backward()
        optimizer.step(lambda: model(torch.ones(3)).square().sum())  # pyright: ignore
        schedule.step(1.0) if plateau else schedule.step()
    return [parameter.detach().clone() for parameter in model.parameters()]


@pytest.mark.parametrize(
    ("optimizer", "schedule"),
    [(name, "StepLR") for name in OPTIMIZERS] + [("SGD", name) for name in SCHEDULES],
)
def test_torch_optimizers_and_schedules_resume(tmp_path, optimizer, schedule):
    def build() -> dict[str, Any]:
        model = nn.Linear(3, 2)
        method = getattr(torch.optim, optimizer)(model.parameters(), lr=0.1)
        return {"model": model, "optimizer": method, "schedule": SCHEDULES[schedule](method, torch.optim.lr_scheduler)}

    first, second = build(), build()
    train_one(*first.values(), steps=4)
    save(tmp_path, **first)
    load(tmp_path, **second)
    assert same(train_one(*second.values(), steps=4), train_one(*first.values(), steps=4))


def test_module_versions_reach_load_state_dict(tmp_path):
    class Versioned(nn.Linear):
        _version = 7

        def _load_from_state_dict(self, state_dict, prefix, local_metadata, *arguments):
            self.loaded = local_metadata.get("version")
            super()._load_from_state_dict(state_dict, prefix, local_metadata, *arguments)

    model = Versioned(2, 2)
    save(tmp_path, model=model)
    load(tmp_path, model=model)
    assert model.loaded == 7


def test_global_generators_are_restored_unless_ignored(tmp_path):
    save(tmp_path, a=1)
    expected = torch.rand(3)
    load(tmp_path)
    assert same(torch.rand(3), expected)
    before = torch.get_rng_state()
    load(tmp_path, ignore="rest")
    load(tmp_path, ignore=["global_generators"])
    save(tmp_path, a=1, global_generators=False)
    assert "global_generators" not in load(tmp_path).manifest["objects"]
    assert same(torch.get_rng_state(), before)


def test_generators_of_cuda_are_kept_where_it_is_in_use(tmp_path, monkeypatch):
    states = [torch.tensor([1, 2], dtype=torch.uint8), torch.tensor([3, 4], dtype=torch.uint8)]
    for name, result in [("is_available", True), ("is_initialized", True), ("device_count", 2)]:
        monkeypatch.setattr(torch.cuda, name, lambda result=result: result)
    monkeypatch.setattr(torch.cuda, "get_rng_state_all", lambda: list(states))
    monkeypatch.setattr(torch.cuda, "set_rng_state_all", lambda new: states.__setitem__(slice(None), new))
    save(tmp_path, a=1)
    saved, states[:] = list(states), [state + 1 for state in states]
    load(tmp_path)
    assert same(states, saved)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    states.pop()
    with pytest.raises(ValueError, match=r"2 CUDA devices, this machine has 1. Pass ignore="):
        load(tmp_path)
    assert same(states, saved[:1])


def test_names_must_match_unless_ignored(tmp_path):
    model, data = nn.Linear(2, 2), torch.Generator()
    save(tmp_path, model=model, data=data, config={"rank": 3})
    assert load(tmp_path, model=model, ignore=("data",)).extra == {"config": {"rank": 3}}
    assert load(tmp_path, ignore="rest").extra == {"config": {"rank": 3}}
    assert load(tmp_path, model=model, ignore=("data", "config")).extra == {}
    with pytest.raises(ValueError, match=r"Not in the checkpoint: \['net'\].*not asked for: \['data', 'model'\]"):
        load(tmp_path, net=model)
    for wrong, message in [
        (dict(ignore="model"), r"Write \('model',\)"),
        (dict(ignore=("model", "data"), model=model), "asked for and ignored"),
        (dict(ignore=("model", "typo"), data=data), r"Not in the checkpoint: \['typo'\]"),
        (dict(model=model, data=data, config={}), "plain value"),
        (dict(model=data, data=data), "model was saved as a stateful object, got a Generator"),
        (dict(model=model, data=data, global_generators=data), "restored by themselves"),
    ]:
        with pytest.raises(ValueError, match=message):
            load(tmp_path, **wrong)


@pytest.mark.parametrize(
    "arguments", [{}, {"step": -1, "a": 1}, {"ignore": 1}, {"a/b": 1}], ids=["nothing", "step", "reserved", "name"]
)
def test_save_refuses_wrong_arguments(tmp_path, arguments):
    with pytest.raises(ValueError, match=r"nothing to save|step must|identifiers"):
        save(tmp_path / "run", **arguments)
    assert not (tmp_path / "run").exists()


def test_weights_alone_are_saved_and_loaded(tmp_path):
    model, other = nn.Linear(3, 2), nn.Linear(3, 2)
    before = torch.get_rng_state()
    save_model(tmp_path / "weights", model, accuracy=0.5)
    assert load_model(tmp_path / "weights", other).extra == {"metadata": {"accuracy": 0.5}}
    assert same(other.state_dict(), model.state_dict())
    save(tmp_path / "run", model=nn.Linear(3, 2), optimizer=torch.optim.SGD(model.parameters()))
    assert isinstance(load_model(tmp_path / "run", model), CheckpointInfo)
    assert not same(other.state_dict(), model.state_dict())
    torch.set_rng_state(before)
