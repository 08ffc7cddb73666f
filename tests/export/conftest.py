"""The networks, compressed, and processes that load what was saved."""

import importlib.util
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from torch import nn

from dynarank.factorize import factorize_
from dynarank.layers.base import low_rank_layers
from dynarank.layers.conv2d import LowRankConv2d
from dynarank.layers.conv2d_spatial import LowRankSpatialConv2d

FOLDER = Path(__file__).parent


@pytest.fixture(scope="session")
def networks() -> ModuleType:
    spec = importlib.util.spec_from_file_location("networks", FOLDER / "networks.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def reduced(dense: nn.Conv2d, *, inner: int, rank: int) -> nn.Sequential:
    """A 1x1 convolution to fewer channels and a low-rank one: a chain that stands for one dense convolution."""
    options: Any = LowRankConv2d.dense_options(dense) | {"in_channels": inner}
    first = nn.Conv2d(dense.in_channels, inner, 1, bias=False)
    return nn.Sequential(first, LowRankConv2d(**options, bias=dense.bias is not None, rank=rank)).eval()


@pytest.fixture
def compressed(networks: ModuleType) -> Callable[..., Any]:
    """Build a network and compress it, every kind of layer included; all of one form if it is given."""

    def build(name: str, *, form: Any = None) -> nn.Module:
        model: Any = networks.build(name)
        if name == "lenet5":
            model.conv2 = reduced(model.conv2, inner=3, rank=2)
        if name == "resnet20":
            block = model.get_submodule("stages.1.0")
            block.conv1 = LowRankSpatialConv2d.from_dense(block.conv1, rank=3)
        factorize_(
            model, rank_fraction=0.25, rank_multiple=2, exclude_modules=["conv2.0"] if name == "lenet5" else None
        )
        for layer in low_rank_layers(model).values():
            layer.set_factors(layer.factors() if form == "core" else layer.point(), form=form)
        return model

    return build


@pytest.fixture
def run_python() -> Callable[..., str]:
    """Run a script in a fresh process that finds ``networks`` and treats warnings as errors; return what it prints."""

    def run(script: str, *arguments: object) -> str:
        paths = [str(FOLDER), str(FOLDER.parents[1] / "src")]
        environment = os.environ | {"PYTHONPATH": os.pathsep.join(paths), "PYTHONWARNINGS": "error"}
        command = [sys.executable, "-c", script, *map(str, arguments)]
        done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=100, check=False)
        assert done.returncode == 0, done.stderr
        return done.stdout

    return run
