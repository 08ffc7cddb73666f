"""Whatever happens to a checkpoint, a complete one is there, and a load that fails changes nothing."""

import copy
import errno
import json
import os
import subprocess
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from dynarank.checkpoint import folder, load, save

assert_same = partial(torch.testing.assert_close, rtol=0, atol=0)


def edit(directory: Path, change: Callable[[dict[str, Any]], object], *, sign: bool = True) -> None:
    """Change the manifest, as someone does who knows the format."""
    path = directory / "manifest.json"
    manifest = json.loads(path.read_text())
    change(manifest)
    path.write_text(json.dumps(manifest | ({"checksum": folder.checksum(manifest)} if sign else {})))


def tensor_path(directory: Path) -> Path:
    return next(directory.glob("tensors-*"))


def leave_folder(directory: Path) -> None:
    os.rename(tensor_path(directory), directory.parent / "outside.safetensors")
    edit(directory, lambda manifest: manifest["tensor_file"].update(name="../outside.safetensors"))


def link_outside(directory: Path) -> None:
    path = tensor_path(directory)
    os.rename(path, directory.parent / "outside.safetensors")
    path.symlink_to(directory.parent / "outside.safetensors")


def flip_byte(directory: Path) -> None:
    content = bytearray(tensor_path(directory).read_bytes())
    content[-1] ^= 1
    tensor_path(directory).write_bytes(content)


DAMAGE: dict[str, tuple[Callable[[Path], object], str]] = {
    "no manifest": (lambda d: (d / "manifest.json").unlink(), "holds no checkpoint"),
    "no tensors": (lambda d: tensor_path(d).unlink(), "is missing"),
    "half a manifest": (lambda d: os.truncate(d / "manifest.json", 300), "damaged"),
    "no JSON": (lambda d: (d / "manifest.json").write_bytes(b"\xff\xfe"), "damaged"),
    "deep JSON": (lambda d: (d / "manifest.json").write_text("[" * 10**6), "damaged"),
    "another format": (lambda d: (d / "manifest.json").write_text("[1]"), "no manifest of"),
    "a new version": (lambda d: edit(d, lambda m: m.update(version=2)), "unknown version 2. Available: 1"),
    "another step": (lambda d: edit(d, lambda m: m.update(step=4), sign=False), "checksum does not match"),
    "no step": (lambda d: edit(d, lambda m: m.pop("step")), "'step' must be a int"),
    "a cut-short file": (lambda d: os.truncate(tensor_path(d), 200), "200 bytes long.*cut short"),
    "a flipped bit": (flip_byte, "SHA-256"),
    "a path upwards": (leave_folder, "must be named"),
    "a link out of the folder": (link_outside, "leads out of the folder"),
    "an undeclared tensor": (lambda d: edit(d, lambda m: m["tensors"].pop("model/bias")), "only used.*model/bias"),
    "an unused tensor": (lambda d: edit(d, lambda m: m["objects"].pop("data")), "only declared.*data"),
    "a tensor that is not there": (
        lambda d: edit(d, lambda m: (m["tensors"].update(x=m["tensors"]["data"]), m["objects"].update(
            x={"kind": "value", "tree": {"$tensor": "x"}}))), "different tensors.*'x'"),
    "another shape": (lambda d: edit(d, lambda m: m["tensors"]["model/bias"].update(shape=[3])), "declares F32"),
    "another dtype": (lambda d: edit(d, lambda m: m["tensors"]["model/bias"].update(dtype="int32")), "declares I32"),
    "no such dtype": (lambda d: edit(d, lambda m: m["tensors"]["model/bias"].update(dtype="int33")), "unknown dtype"),
    "no such order": (lambda d: edit(d, lambda m: m["tensors"]["model/bias"].update(order=[1])), "permutation"),
    "no such node": (lambda d: edit(d, lambda m: m["objects"]["data"].update(tree={"$pickle": "x"})), "no such node"),
    "no such kind": (lambda d: edit(d, lambda m: m["objects"]["data"].update(kind="code")), "kind out of"),
}  # fmt: skip


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_damaged_checkpoint_is_refused_with_one_message_and_changes_nothing(tmp_path, damage):
    model, data = nn.Linear(2, 2), torch.Generator()
    save(tmp_path / "run", model=nn.Linear(2, 2), data=torch.Generator().manual_seed(5))
    harm, message = DAMAGE[damage]
    harm(tmp_path / "run")
    before = copy.deepcopy((model.state_dict(), data.get_state(), torch.get_rng_state()))
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        load(tmp_path / "run", model=model, data=data)
    assert_same((model.state_dict(), data.get_state(), torch.get_rng_state()), before)


class Resizing(nn.Module):
    """Takes whatever shape it is given, as low-rank layers do, and draws a random number when loaded."""

    def __init__(self, rank: int) -> None:
        super().__init__()
        self.A = nn.Parameter(torch.randn(rank, 3))

    def _load_from_state_dict(self, state_dict, prefix, *arguments):
        torch.rand(1)
        self.A = nn.Parameter(torch.empty_like(state_dict[prefix + "A"]))
        super()._load_from_state_dict(state_dict, prefix, *arguments)


class Refusing:
    def __init__(self, failure: BaseException | None = None, *, always: bool = True) -> None:
        self.failure, self.always, self.count = failure, always, 0

    def state_dict(self) -> dict[str, int]:
        return {"count": self.count}

    def load_state_dict(self, state: dict[str, int]) -> None:
        self.count += 1
        if self.failure and (self.always or self.count == 1):
            raise self.failure


def test_a_changed_rank_is_loaded(tmp_path):
    save(tmp_path, model=Resizing(4))
    model = Resizing(2)
    load(tmp_path, model=model)
    assert model.A.shape == (4, 3)


@pytest.mark.parametrize("failure", [RuntimeError("not mine"), KeyError("x"), KeyboardInterrupt()], ids=repr)
def test_a_failure_in_a_later_object_puts_all_back(tmp_path, failure):
    def build(rank: int) -> dict[str, Any]:
        model, plain = Resizing(rank), nn.Linear(3, rank)
        method = torch.optim.SGD(plain.parameters(), lr=0.1, momentum=0.9)
        plain(torch.ones(3)).sum().backward()
        method.step()
        return {"data": torch.Generator().manual_seed(rank), "optimizer": method, "model": model, "late": Refusing()}

    save(tmp_path, **build(4))
    objects = build(2)
    objects["late"] = Refusing(failure, always=False)
    before = copy.deepcopy([objects[name].state_dict() for name in ("model", "optimizer")])
    generators = [objects["data"].get_state(), torch.get_rng_state()]
    expected = ValueError if isinstance(failure, Exception) else KeyboardInterrupt
    with pytest.raises(expected, match="late refused its state.*put back" if expected is ValueError else None):
        load(tmp_path, **objects)
    assert_same([objects[name].state_dict() for name in ("model", "optimizer")], before)
    assert_same([objects["data"].get_state(), torch.get_rng_state()], generators)


def test_shapes_that_do_not_fit_are_one_error(tmp_path):
    save(tmp_path, model=nn.Linear(3, 2))
    model = nn.Linear(4, 2)
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(ValueError, match=r"(?s)model refused its state.*size mismatch"):
        load(tmp_path, model=model)
    assert_same(model.state_dict(), before)


def test_an_object_that_cannot_be_put_back_is_named(tmp_path):
    save(tmp_path, thing=Refusing())
    with pytest.raises(RuntimeError, match=r"refused the state that they had before.*'thing': 'broken'"):
        load(tmp_path, thing=Refusing(RuntimeError("broken")))


def interrupt(monkeypatch: pytest.MonkeyPatch, *, at: int, fault: Callable[[], BaseException]) -> None:
    """Let the disk fail at its n-th operation, in the middle of a write or before anything else."""
    countdown = iter(range(at, -1, -1))

    def wrap(operation: Callable[..., Any], is_write: bool) -> Callable[..., Any]:
        def wrapped(*arguments: Any, **options: Any) -> Any:
            if next(countdown, -1) == 0:
                if is_write:
                    arguments[0].write(arguments[1][: len(arguments[1]) // 2])
                raise fault()
            return operation(*arguments, **options)

        return wrapped

    for owner, name in [(os, "fsync"), (os, "replace"), (Path, "unlink"), (folder, "_write")]:
        monkeypatch.setattr(owner, name, wrap(getattr(owner, name), name == "_write"))


def run_at(step: int) -> dict[str, Any]:
    return {"step": step, "a": torch.full((999,), step), "b": {"c": torch.full((3,), float(step)), "d": step}}


def loaded_step(directory: Path) -> int:
    info = load(directory)
    assert_same(info.extra, {key: value for key, value in run_at(info.step).items() if key != "step"})
    return info.step


@pytest.mark.parametrize("at", range(14))
@pytest.mark.parametrize("fault", [lambda: OSError(errno.ENOSPC, "No space left on device"), KeyboardInterrupt])
def test_a_failing_disk_leaves_a_complete_checkpoint(tmp_path, monkeypatch, at, fault):
    save(tmp_path, **run_at(1))
    interrupted = None
    with monkeypatch.context() as patch:
        interrupt(patch, at=at, fault=fault)
        try:
            save(tmp_path, **run_at(2))
        except (OSError, KeyboardInterrupt) as caught:
            interrupted = caught
    committed = at > 10
    if isinstance(interrupted, OSError):
        assert interrupted.errno == errno.ENOSPC
        assert ("may be lost if power fails" if committed else "was not saved (No space left") in str(interrupted)
        assert "still holds its last complete checkpoint" in str(interrupted)
    assert bool(interrupted) == (at < 12 or (at == 12 and fault is KeyboardInterrupt))
    assert loaded_step(tmp_path) == (2 if committed else 1)
    assert committed or len(list(tmp_path.iterdir())) == 2
    save(tmp_path, **run_at(3))
    assert loaded_step(tmp_path) == 3
    assert len(list(tmp_path.iterdir())) == 2


def test_a_first_save_that_fails_says_that_there_is_none(tmp_path, monkeypatch):
    interrupt(monkeypatch, at=2, fault=lambda: OSError(errno.EIO, "Input/output error"))
    with pytest.raises(OSError, match="the folder holds none yet"):
        save(tmp_path / "run", a=torch.ones(2))
    assert list((tmp_path / "run").iterdir()) == []


def test_a_failed_save_of_the_same_tensors_keeps_them(tmp_path, monkeypatch):
    save(tmp_path, step=1, a=torch.ones(3), global_generators=False)
    with monkeypatch.context() as patch:
        interrupt(patch, at=5, fault=lambda: OSError(errno.EIO, "Input/output error"))
        with pytest.raises(OSError, match="was not saved"):
            save(tmp_path, step=2, a=torch.ones(3), global_generators=False)
    assert load(tmp_path).step == 1


def test_files_of_others_are_left_alone(tmp_path):
    names = ["notes.txt", "tensors-mine.safetensors", "model.safetensors"]
    for name in names:
        (tmp_path / name).write_text("mine")
    for step in (1, 2):
        save(tmp_path, step=step, a=torch.tensor(step))
    assert {path.name for path in tmp_path.iterdir()} > {*names, "manifest.json"}
    assert len(list(tmp_path.iterdir())) == len(names) + 2


def test_a_reader_that_is_overtaken_by_a_save_reads_the_new_one(tmp_path, monkeypatch):
    save(tmp_path, **run_at(1))
    original = folder.read_manifest
    pending = [2]

    def overtaken(directory: Path) -> dict[str, Any]:
        manifest = original(directory)
        if pending:
            save(directory, **run_at(pending.pop()))
        return manifest

    monkeypatch.setattr("dynarank.checkpoint.loading.read_manifest", overtaken)
    assert loaded_step(tmp_path) == 2


# Saves step 2 over step 1 once for each operation on the disk, in a process of its own that dies there.
KILLED = """
import os, resource, signal, sys
from pathlib import Path
import torch
from dynarank.checkpoint import folder, save

torch.set_num_threads(1)
root, way = Path(sys.argv[1]), sys.argv[2]

def run_at(step):
    return {"step": step, "a": torch.full((999,), step), "b": {"c": torch.full((3,), float(step)), "d": step}}

def die_at(count):
    left = [count]
    def wrap(operation):
        def wrapped(*arguments):
            if left[0] == 0:
                if operation is write:
                    arguments[0].write(arguments[1][: len(arguments[1]) // 2])
                    arguments[0].flush()
                os.kill(os.getpid(), signal.SIGKILL)
            left[0] -= 1
            return operation(*arguments)
        return wrapped
    write = folder._write
    folder._write, os.fsync, os.replace = wrap(write), wrap(os.fsync), wrap(os.replace)

for count in range(12 if way == "killed" else 9):
    save(root / str(count), **run_at(1))
    if os.fork() == 0:
        if way == "killed":
            die_at(count)
        else:
            resource.setrlimit(resource.RLIMIT_FSIZE, (1000 * count, 1000 * count))
        try:
            save(root / str(count), **run_at(2))
        except OSError as error:
            os._exit(3 if "was not saved (File too large)" in str(error) else 4)
        os._exit(0)
    print(os.waitstatus_to_exitcode(os.wait()[1]))
"""


@pytest.mark.slow
@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
@pytest.mark.parametrize(("way", "status"), [("killed", -9), ("limited", 3)])
def test_a_process_that_dies_while_saving_leaves_a_complete_checkpoint(tmp_path, way, status):
    source = str(Path(folder.__file__).parents[2])
    environment = os.environ | {"PYTHONPATH": source, "PYTHONWARNINGS": "error"}
    command = [sys.executable, "-c", KILLED, str(tmp_path), way]
    output = subprocess.run(command, env=environment, check=True, capture_output=True, text=True, timeout=100).stdout
    statuses = [int(line) for line in output.split()]
    assert status in statuses
    assert set(statuses) <= {status, 0}
    for count, found in enumerate(statuses):
        directory = tmp_path / str(count)
        assert loaded_step(directory) == (1 if found == 3 or (way == "killed" and count < 11) else 2)
        save(directory, **run_at(3))
        assert loaded_step(directory) == 3
        assert len(list(directory.iterdir())) == 2
