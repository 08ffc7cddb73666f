"""Whatever happens to its folder, a complete compressed model is there; a load that fails changes nothing."""

import copy
import errno
import json
import os
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from torch import nn

from dynarank.export import load_compressed, read_manifest, save_compressed
from dynarank.factorize import factorize_

assert_same = partial(torch.testing.assert_close, rtol=0, atol=0)


def dense() -> nn.Sequential:
    return nn.Sequential(nn.Linear(12, 10), nn.ReLU(), nn.Linear(10, 4))


def compressed(*, rank: int = 2) -> nn.Sequential:
    model = dense()
    factorize_(model, rank=rank)
    return model


def edit(folder: Path, **changes: Any) -> None:
    path = folder / "dynarank.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def flip_byte(folder: Path) -> None:
    path = folder / "model.safetensors"
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)


DAMAGE: dict[str, tuple[Callable[[Path], object], str]] = {
    "no manifest": (lambda f: (f / "dynarank.json").unlink(), "holds no compressed model: dynarank.json is missing"),
    "no tensors": (lambda f: (f / "model.safetensors").unlink(), "holds no compressed model: model.safetensors is"),
    "half a manifest": (lambda f: os.truncate(f / "dynarank.json", 99), "dynarank.json is damaged"),
    "deep JSON": (lambda f: (f / "dynarank.json").write_text("[" * 10**6), "dynarank.json is damaged"),
    "a manifest of others": (lambda f: (f / "dynarank.json").write_text("[1]"), "no manifest of a dynarank.compressed"),
    "another format": (lambda f: edit(f, format="dynarank.checkpoint"), "no manifest of a dynarank.compressed model"),
    "a newer version": (lambda f: edit(f, version=2, dynarank="9.0"), r"unknown version 2. Available: 1.*'9\.0'"),
    "no structure": (lambda f: edit(f, structure=None), "'structure' must be a dict, got None"),
    "no structure before": (lambda f: edit(f, previous={"format": "x"}), "no manifest of a dynarank.compressed"),
    "a cut-short file": (lambda f: os.truncate(f / "model.safetensors", 80), "is damaged: its SHA-256"),
    "a flipped bit": (flip_byte, "is damaged: its SHA-256"),
    "a name for nothing": (lambda f: edit(f, shared={"3.weight": "9"}), "does not fit"),
}  # fmt: skip


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_damaged_folder_is_refused_and_the_model_left_alone(tmp_path: Path, damage: str):
    save_compressed(tmp_path, compressed())
    harm, message = DAMAGE[damage]
    harm(tmp_path)
    if damage == "a name for nothing":
        edit(tmp_path, structure={})
    model = dense()
    modules, state = [*model.modules()], copy.deepcopy(model.state_dict())
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        load_compressed(tmp_path, model)
    assert [*model.modules()] == modules
    assert_same(model.state_dict(), state)


class Tied(nn.Module):
    def __init__(self, *, tied: bool) -> None:
        super().__init__()
        self.one, self.two = nn.Linear(6, 6), nn.Linear(6, 6)
        self.two.weight = self.one.weight if tied else self.two.weight


class Scaled(nn.Sequential):
    def __init__(self) -> None:
        super().__init__(nn.Linear(12, 10), nn.ReLU(), nn.Linear(10, 4))
        self.register_buffer("scale", torch.ones(1), persistent=False)


ARCHITECTURES: dict[str, tuple[Callable[[], nn.Module], Callable[[], nn.Module], str]] = {
    "no such layer": (compressed, lambda: nn.Sequential(nn.ReLU()), "another architecture: .* not in the model: '0'"),
    "a narrower layer": (compressed, lambda: nn.Sequential(nn.Linear(12, 9)), "'0' has out_features 10 in"),
    "another head": (compressed, lambda: nn.Sequential(nn.Linear(12, 10), nn.ReLU(), nn.Linear(10, 5)),
                     r"2.weight has shape \(4, 10\) in the file and \(5, 10\) in the model"),
    "one layer more": (compressed, lambda: nn.Sequential(*dense(), nn.Linear(4, 4)), "3.bias is not in the file"),
    "one layer less": (compressed, lambda: dense()[:2], "2.bias is only in the file; 2.weight is only in the file"),
    "tied weights": (lambda: Tied(tied=False), lambda: Tied(tied=True), "two.weight and one.weight are one tensor"),
    "a buffer without values": (compressed, lambda: Scaled().to("meta"), "scale is on the meta device and, being no"),
}  # fmt: skip


@pytest.mark.parametrize("case", ARCHITECTURES)
def test_another_architecture_is_refused_and_left_as_it_is(tmp_path: Path, case: str):
    saved, build, message = ARCHITECTURES[case]
    save_compressed(tmp_path, saved())
    model = build()
    modules, printed, state = [*model.modules()], repr(model), dict(model.state_dict(keep_vars=True))
    values = copy.deepcopy(state)
    with pytest.raises(ValueError, match=message):
        load_compressed(tmp_path, model)
    assert [*model.modules()] == modules and repr(model) == printed
    assert all(tensor is state[name] for name, tensor in model.state_dict(keep_vars=True).items())
    if not any(tensor.is_meta for tensor in state.values()):
        assert_same(state, values)


def test_what_a_file_cannot_hold_is_named_before_anything_is_written(tmp_path: Path):
    folder = tmp_path / "model"
    model = compressed()
    with pytest.raises(TypeError, match=r"metadata 'when': .* does not come back from JSON"):
        save_compressed(folder, model, when={1, 2})
    with pytest.raises(TypeError, match=r"metadata 'pair': \(1, 2\) does not come back from JSON"):
        save_compressed(folder, model, pair=(1, 2))
    with pytest.raises(TypeError, match=r"0\.A: a file cannot hold a tensor on the meta device"):
        save_compressed(folder, copy.deepcopy(model).to("meta"))
    model[1].register_buffer("sparse", torch.eye(3).to_sparse())
    with pytest.raises(TypeError, match=r"1\.sparse: a file cannot hold a tensor of layout torch\.sparse_coo"):
        save_compressed(folder, model)
    assert not folder.exists()


def test_files_of_others_are_not_overwritten(tmp_path: Path):
    safetensors.torch.save_file({"a": torch.ones(1)}, tmp_path / "model.safetensors")
    with pytest.raises(FileExistsError, match=r"model\.safetensors of someone else\. Name another folder"):
        save_compressed(tmp_path, compressed())
    (tmp_path / "dynarank.json").write_text("{}")
    with pytest.raises(ValueError, match=r"no manifest of a dynarank\.compressed model"):
        save_compressed(tmp_path, compressed())
    assert list(safetensors.torch.load_file(tmp_path / "model.safetensors")) == ["a"]


def interrupt(patch: pytest.MonkeyPatch, *, at: int) -> None:
    """Let the disk fail at its n-th operation."""
    left = [at]

    def wrap(operation: Callable[..., Any]) -> Callable[..., Any]:
        def wrapped(*arguments: Any) -> Any:
            left[0] -= 1
            if left[0] == -1:
                raise OSError(errno.ENOSPC, "No space left on device")
            return operation(*arguments)

        return wrapped

    for name in ("fsync", "replace"):
        patch.setattr(os, name, wrap(getattr(os, name)))


def loaded_step(folder: Path) -> int:
    """Return the step of the model in a folder after checking that all of it is of that step."""
    step = read_manifest(folder)["metadata"]["step"]
    model: Any = load_compressed(folder, dense())
    assert model[0].rank == step and bool((model[2].weight == step).all())
    return step


def save_step(folder: Path, step: int) -> None:
    model: Any = compressed(rank=step)
    nn.init.constant_(model[2].weight, step)
    save_compressed(folder, model, step=step)


@pytest.mark.parametrize("at", range(9))
def test_a_failing_disk_leaves_a_complete_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, at: int):
    save_step(tmp_path, 1)
    with monkeypatch.context() as patch, pytest.raises(OSError, match="No space left"):
        interrupt(patch, at=at)
        save_step(tmp_path, 2)
    assert loaded_step(tmp_path) == (1 if at < 5 else 2)
    save_step(tmp_path, 3)
    assert loaded_step(tmp_path) == 3
    assert sorted(path.name for path in tmp_path.iterdir()) == ["dynarank.json", "model.safetensors"]


def test_a_first_save_that_fails_leaves_none(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    for at in range(5):
        with monkeypatch.context() as patch, pytest.raises(OSError, match="No space left"):
            interrupt(patch, at=at)
            save_step(tmp_path, 1)
        with pytest.raises(FileNotFoundError, match="holds no compressed model"):
            load_compressed(tmp_path, dense())
    save_step(tmp_path, 1)
    assert loaded_step(tmp_path) == 1
