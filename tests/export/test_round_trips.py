"""From a trained network to another process: compressed, saved, loaded where dynarank is, and run where it is not."""

import os
import signal
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from dynarank.compress import compress_
from dynarank.export import load_compressed, read_manifest, save_compressed, save_plain
from dynarank.factorize import factorize_, merge_, to_plain_
from dynarank.layers.base import low_rank_layers

NAMES = ("mlp", "lenet5", "resnet20", "gpt", "encoder", "language", "vision")
assert_same = partial(torch.testing.assert_close, rtol=0, atol=0)

# Loads every folder below the first argument into a network of that name, and keeps its outputs.
LOAD = """
import sys, torch
from pathlib import Path
import networks
from dynarank.export import load_compressed

torch.set_num_threads(1)
for folder in Path(sys.argv[1]).iterdir():
    model = load_compressed(folder, networks.build(folder.name))
    with torch.no_grad():
        torch.save(model(torch.load(folder / "x.pt")), folder / "y.pt")
"""

# Runs every program below the first argument where dynarank cannot be imported; prints the largest differences.
RUN = """
import sys, torch
from pathlib import Path

sys.modules["dynarank"] = None
for path in Path(sys.argv[1]).glob("*.pt2"):
    x, y = torch.load(path.with_suffix(".pt"))
    with torch.no_grad():
        print(float((torch.export.load(path).module()(x) - y).abs().max()))
"""


@pytest.mark.slow
@pytest.mark.parametrize("calibrated", [False, True])
def test_a_compressed_network_computes_the_same_elsewhere(
    networks: Any, run_python: Any, tmp_path: Path, calibrated: bool
):
    expected = {}
    for name in NAMES:
        model, x = networks.build(name), networks.batch(name)
        compress_(model, 0.7, calibration=[torch.cat([x, x])] if calibrated else None)
        assert low_rank_layers(model)
        save_compressed(tmp_path / "folders" / name, model)
        torch.save(x, tmp_path / "folders" / name / "x.pt")
        save_plain(tmp_path / f"{name}.pt2", model, x, dynamic_batch=True)
        x3 = torch.cat([x, x[:1]])
        with torch.no_grad():
            expected[name] = model(x)
            torch.save((x3, model(x3)), tmp_path / f"{name}.pt")
    run_python(LOAD, tmp_path / "folders")
    assert_same({name: torch.load(tmp_path / "folders" / name / "y.pt") for name in NAMES}, expected)
    differences = [float(line) for line in run_python(RUN, tmp_path).split()]
    assert len(differences) == len(NAMES) and max(differences) < 1e-6


# In lenet5 a chain stands for one convolution; merging leaves its 1x1 convolution.
@pytest.mark.parametrize("name", [name for name in NAMES if name != "lenet5"])
def test_a_merged_network_loads_into_the_class_it_came_from(networks: Any, compressed: Any, name: str):
    model, x = compressed(name), networks.batch(name)
    expected = model(x)
    merge_(model)
    other = networks.build(name)
    other.load_state_dict(model.state_dict())
    torch.testing.assert_close(other(x), expected, atol=2e-6, rtol=1e-5)


# torch says that its quantisation moves to torchao.
@pytest.mark.filterwarnings("ignore:torch.ao.quantization is deprecated:DeprecationWarning")
@pytest.mark.filterwarnings("ignore:torch.quantize_per_tensor:UserWarning")
@pytest.mark.skipif("fbgemm" not in torch.backends.quantized.supported_engines, reason="needs an engine for int8")
def test_dynamic_quantisation_sees_both_linear_layers():
    model = nn.Sequential(nn.Linear(64, 48), nn.ReLU(), nn.Linear(48, 10))
    factorize_(model, rank=8)
    to_plain_(model)
    x = torch.randn(5, 64)
    expected = model(x)
    quantised = torch.ao.quantization.quantize_dynamic(model, {nn.Linear})
    kinds = [type(module).__module__ for module in (quantised[0][0], quantised[0][1], quantised[2])]
    assert kinds == ["torch.ao.nn.quantized.dynamic.modules.linear"] * 3
    torch.testing.assert_close(quantised(x), expected, atol=0.05, rtol=0.05)


def died_at(count: int, folder: Path) -> int:
    """Save step 2 in a process that dies at the n-th operation on the disk; return how it ended."""

    def die(operation: Any) -> Any:
        def wrapped(*arguments: Any) -> Any:
            nonlocal count
            if count == 0:
                os.kill(os.getpid(), signal.SIGKILL)
            count -= 1
            return operation(*arguments)

        return wrapped

    process = os.fork()
    if process == 0:
        os.fsync, os.replace = die(os.fsync), die(os.replace)
        save_compressed(
            folder, nn.Linear(3, 2).requires_grad_(False).apply(lambda m: nn.init.constant_(m.weight, 2)), step=2
        )
        os._exit(0)
    return os.waitstatus_to_exitcode(os.waitpid(process, 0)[1])


@pytest.mark.slow
@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
@pytest.mark.filterwarnings("ignore:.*multi-threaded.*fork:DeprecationWarning")
@pytest.mark.parametrize("count", range(10))
def test_a_process_that_dies_while_saving_leaves_a_complete_model(tmp_path: Path, count: int):
    model = nn.Linear(3, 2)
    nn.init.constant_(model.weight, 1)
    save_compressed(tmp_path, model, step=1)
    assert died_at(count, tmp_path) == (-signal.SIGKILL if count < 9 else 0)
    step = 1 if count < 5 else 2
    assert read_manifest(tmp_path)["metadata"] == {"step": step}
    loaded: Any = load_compressed(tmp_path, nn.Linear(3, 2))
    assert bool((loaded.weight == step).all())
    save_compressed(tmp_path, model, step=3)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["dynarank.json", "model.safetensors"]


@pytest.mark.parametrize("form", ["pt2", "state_dict"])
def test_a_low_rank_embedding_is_written_as_plain_layers(tmp_path: Path, form: Any):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Embedding(40, 24), nn.Linear(24, 20))
    factorize_(model, rank=3, target_modules=["0", "1"], include_head=True)
    file = tmp_path / {"pt2": "model.pt2", "state_dict": "model.safetensors"}[form]
    report = save_plain(file, model.eval(), torch.arange(5), format=form)
    assert report.largest_difference == 0
    assert report.dense_bytes == 4 * (40 * 24 + 24 * 20 + 20)
