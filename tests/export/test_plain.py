"""``save_plain`` writes files that compute what the model computes, without dynarank, and leaves the model alone."""

import copy
import json
from functools import partial
from pathlib import Path
from typing import Any

import onnx
import pytest
import torch
from torch import nn

from dynarank.export import plain, save_plain
from dynarank.factorize import factorize_
from dynarank.layers.base import low_rank_layers
from dynarank.layers.conv2d import LowRankConv2d

NAMES = ("mlp", "lenet5", "resnet20", "gpt", "encoder", "language", "vision")
SUFFIXES = {"pt2": ".pt2", "onnx": ".onnx", "state_dict": ".safetensors"}
slow = partial(pytest.param, marks=pytest.mark.slow)
CASES = [
    *(pytest.param("pt2", name, id=f"pt2-{name}") for name in NAMES),
    *(pytest.param("state_dict", name, id=f"state_dict-{name}") for name in NAMES),
    pytest.param("onnx", "mlp", id="onnx-mlp"),
    *(slow("onnx", name, id=f"onnx-{name}") for name in NAMES[1:]),
]


@pytest.mark.parametrize(("format", "name"), CASES)
@pytest.mark.parametrize("form", ["pair", "core"])
def test_files_compute_what_the_model_computes(
    networks: Any, compressed: Any, tmp_path: Path, format: Any, name: str, form: str
):
    model, x = compressed(name, form=form).train(), networks.batch(name)
    modules, state = dict(model.named_modules()), dict(model.state_dict(keep_vars=True))
    values, generator = copy.deepcopy(state), torch.get_rng_state()
    path = tmp_path / f"model{SUFFIXES[format]}"
    report = save_plain(path, model, x, format=format, dynamic_batch=True)
    assert report.largest_difference < 2e-6
    assert report.bytes == path.stat().st_size and [*tmp_path.iterdir()] == [path]
    assert {layer.name for layer in report.layers} == low_rank_layers(model).keys()
    assert str(Path(__file__).parents[2]).encode() not in path.read_bytes()
    # the model is as it was
    assert dict(model.named_modules()) == modules and all(module.training for module in modules.values())
    assert all(tensor is state[key] for key, tensor in model.state_dict(keep_vars=True).items())
    torch.testing.assert_close(state, values, rtol=0, atol=0)
    assert torch.equal(torch.get_rng_state(), generator)


# The function in the docstring of save_plain, given as the second argument, loads each file where there is no dynarank.
REBUILD = """
import json, sys, safetensors, torch
from pathlib import Path
from torch import nn
import networks

sys.modules["dynarank"] = None
exec(sys.argv[2])
for path in Path(sys.argv[1]).glob("*.safetensors"):
    for device in ("cpu", "meta")[: 1 if path.stem == "vision" else 2]:
        with torch.device(device):
            model = networks.build(path.stem)
        x, y = torch.load(path.with_suffix(".pt"))
        with torch.no_grad():
            print(float((load_plain(path, model)(x) - y).abs().max()))
"""


def test_the_function_in_the_docstring_rebuilds_a_model_without_dynarank(
    networks: Any, compressed: Any, run_python: Any, tmp_path: Path
):
    text = str(save_plain.__doc__).partition("does it::\n\n")[2].partition("\n\n    Layers become")[0]
    lines = [line.removeprefix(" " * 8) for line in text.splitlines()]
    assert lines[0].startswith("def load_plain(") and len(lines) < 20
    for name in ("encoder", "language", "vision"):
        model, x = compressed(name), networks.batch(name)
        if name == "vision":  # a chain that stands for one convolution
            model.conv = nn.Sequential(nn.Conv2d(3, 2, 1, bias=False), LowRankConv2d(2, 12, 3, padding=1, rank=3))
        save_plain(tmp_path / f"{name}.safetensors", model, x, format="state_dict")
        torch.save((x, model(x).detach()), tmp_path / f"{name}.pt")
    differences = [float(line) for line in run_python(REBUILD, tmp_path, "\n".join(lines)).split()]
    assert len(differences) == 5 and max(differences) < 1e-6


def test_an_onnx_file_holds_no_dense_weight(tmp_path: Path):
    model = nn.Sequential(nn.Linear(300, 200), nn.ReLU(), nn.Linear(200, 5))
    factorize_(model, rank=4)
    report = save_plain(tmp_path / "m.onnx", model, torch.randn(2, 300), format="onnx")
    shapes = {tuple(tensor.dims) for tensor in onnx.load(report.file).graph.initializer}
    assert shapes == {(4, 300), (200, 4), (200,), (5, 200), (5,)}
    assert report.dense_bytes == 4 * (300 * 200 + 200 + 1005) and report.bytes < 0.1 * report.dense_bytes


def test_inputs_may_be_named_and_a_single_sample_opens_the_batch(tmp_path: Path):
    class Sum(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.one, self.two = nn.Linear(9, 8), nn.Linear(7, 8)

        def forward(self, x: Any, *, y: Any, mask: Any) -> dict[str, Any]:
            return {"sum": (self.one(x) + self.two(y)) * mask, "mask": mask}

    model = Sum()
    factorize_(model, rank=2, include_head=True)
    inputs = {"x": torch.randn(1, 9), "y": torch.randn(1, 7), "mask": torch.rand(8)}
    report = save_plain(tmp_path / "m.pt2", model, inputs, dynamic_batch=True)
    program = torch.export.load(report.file).module()
    more = inputs | {"x": torch.randn(5, 9), "y": torch.randn(5, 7)}
    torch.testing.assert_close(program(**more), model(**more))
    fixed = torch.export.load(save_plain(tmp_path / "m.pt2", model, inputs).file).module()
    with pytest.raises((AssertionError, RuntimeError), match=r"Guard failed|to be equal to 1"):
        fixed(**more)


def test_dense_parameters_are_not_copied(
    networks: Any, compressed: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    seen: list[Any] = []
    monkeypatch.setitem(plain.FORMATS, "pt2", (".pt2", lambda path, model, *_: seen.append(model) or path.touch() or
                        (lambda inputs: inputs.run(model))))  # fmt: skip
    model = compressed("vision")
    save_plain(tmp_path / "m.pt2", model, networks.batch("vision"))
    for name, parameter in model.named_parameters():
        shared = any(parameter is other for other in seen[0].parameters())
        assert shared == (name.rpartition(".")[2] not in "AB")
    assert seen[0].norm.running_mean is not model.norm.running_mean
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    model(networks.batch("vision")).sum().backward()
    optimizer.step()  # it does not take the factors for replaced ones


def test_the_report_prints_and_goes_into_json(compressed: Any, networks: Any, tmp_path: Path):
    report = save_plain(tmp_path / "m.safetensors", compressed("mlp"), networks.batch("mlp"), format="state_dict")
    assert str(report).splitlines()[-1].startswith("m.safetensors: ")
    assert "of the dense weights; outputs differ by at most" in str(report)
    assert json.loads(json.dumps(report.as_dict()))["layers"][0]["form"] == "plain"
