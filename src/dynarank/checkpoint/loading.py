"""Load a training run, or the weights of one model: everything is checked first, and a failure changes nothing."""

import errno
import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import nn

from dynarank.checkpoint import tensors as tensor_file
from dynarank.checkpoint.folder import check_tensor_file, read_manifest
from dynarank.checkpoint.objects import (
    GLOBAL_GENERATORS,
    KINDS,
    VALUE,
    global_states,
    kind_of,
    order_of,
    set_global_states,
    set_state,
    snapshot,
)
from dynarank.checkpoint.tree import unflatten


@dataclass(frozen=True)
class CheckpointInfo:
    """What a checkpoint says besides the objects that were loaded from it.

    Args:
        step: Number of optimizer steps taken when it was saved.
        manifest: The manifest as read: versions, shapes, dtypes and trees.
        extra: The plain values, by name. Tensors in them are on the CPU.
    """

    step: int
    manifest: dict[str, Any]
    extra: dict[str, Any]


def load(directory: str | os.PathLike[str], *, ignore: Iterable[str] = (), **objects: Any) -> CheckpointInfo:
    """Load what `save` wrote into the objects given, bit for bit, after checking all of it.

    Objects are loaded by their own ``load_state_dict``, modules first and generators last. Every object in the
    checkpoint must be asked for or ignored, except plain values, which are returned, and torch's global generators,
    which are restored by themselves if they were saved. A copy of the present states is kept on the CPU meanwhile.

    Args:
        directory: The folder.
        ignore: Names in the checkpoint to leave out, or ``"rest"`` for all that are not asked for, the global
            generators included. Plain values are left out only by name.
        objects: By the names given to `save`, the objects to load into.

    Raises:
        FileNotFoundError: If the folder holds no checkpoint, or its tensor file is missing.
        ValueError: If the checkpoint is damaged, names do not match, or an object refuses its state; the message names
            it. Every object is as it was before.
        TypeError: If the present state of an object holds something that cannot be copied. Nothing was changed.
        RuntimeError: If an object refused its state, and then also the state it had before.

    Example:
        >>> import tempfile, torch
        >>> from dynarank.checkpoint import save
        >>> model = nn.Linear(3, 2)
        >>> optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     save(folder, step=7, model=model, optimizer=optimizer, config={"betas": (0.9, 0.99)})
        ...     info = load(folder, model=model, optimizer=optimizer)
        ...     weights_only = load(folder, model=model, ignore="rest")
        >>> info.step, info.extra
        (7, {'config': {'betas': (0.9, 0.99)}})
    """
    ignored = ignore if isinstance(ignore, str) else frozenset(ignore)
    manifest, states = _read(Path(directory), objects, ignored)
    kinds = {name: entry["kind"] for name, entry in manifest["objects"].items()}
    _apply(objects, states)
    extra = {name: state for name, state in states.items() if kinds[name] == VALUE}
    return CheckpointInfo(step=manifest["step"], manifest=manifest, extra=extra)


def load_model(directory: str | os.PathLike[str], model: nn.Module) -> CheckpointInfo:
    """Load the weights of a model from what `save_model` wrote, or from the ``model`` of a whole run.

    Args:
        directory: The folder.
        model: The model to load into. No generator is touched.

    Raises:
        FileNotFoundError: If the folder holds no checkpoint, or its tensor file is missing.
        ValueError: If the checkpoint is damaged or the model refuses it. The model is as it was before.

    Example:
        >>> import tempfile
        >>> from dynarank.checkpoint import save_model
        >>> model = nn.Linear(3, 2)
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     save_model(folder, model, accuracy=0.99)
        ...     load_model(folder, model).extra["metadata"]
        {'accuracy': 0.99}
    """
    return load(directory, ignore="rest", model=model)


def _read(folder: Path, objects: Mapping[str, Any], ignore: str | frozenset[str]) -> tuple[dict[str, Any], dict]:
    """Return the manifest and the states of the selected objects, with everything in the folder checked."""
    manifest = read_manifest(folder)
    _check_objects(folder, manifest)
    selected = _select(folder, manifest, objects, ignore)
    try:
        path = check_tensor_file(folder, manifest)
        return manifest, _decode(path, manifest, selected)
    except FileNotFoundError as cause:
        if read_manifest(folder)["checksum"] == manifest["checksum"]:
            name = manifest["tensor_file"]["name"]
            message = f"{folder}: {name} is missing. Copy it again, or load another checkpoint."
            raise FileNotFoundError(errno.ENOENT, message) from cause
    return _read(folder, objects, ignore)  # another process replaced the checkpoint between the two reads


def _check_objects(folder: Path, manifest: Mapping[str, Any]) -> None:
    """Check that every tree can be rebuilt, and that together they use exactly the tensors declared."""
    used: set[str] = set()
    for name, entry in manifest["objects"].items():
        if not isinstance(entry, dict) or entry.get("kind") not in KINDS or "tree" not in entry:
            raise ValueError(f"{folder}: {name} must have a tree and a kind out of {KINDS}, got {str(entry)[:80]}.")
        try:
            unflatten(entry["tree"], tensor=used.add)
        except ValueError as cause:
            raise ValueError(f"{folder}: the state of {name} cannot be read: {cause}") from cause
    declared = set(manifest["tensors"])
    if used != declared:
        raise ValueError(
            f"{folder}: objects and declared tensors differ: only used {sorted(used - declared)}, "
            f"only declared {sorted(declared - used)}."
        )


def _select(
    folder: Path, manifest: Mapping[str, Any], objects: Mapping[str, Any], ignore: str | frozenset[str]
) -> list[str]:
    """Return the names whose state is needed, once asked for, ignored and stored names agree."""
    stored = {name: entry["kind"] for name, entry in manifest["objects"].items()}
    free = {name for name, kind in stored.items() if kind == VALUE}
    ignored = _ignored_names(ignore, set(stored) - set(objects) - free)
    missing = (set(objects) | ignored) - set(stored)
    unexpected = set(stored) - set(objects) - ignored - free - {GLOBAL_GENERATORS}
    if missing or unexpected:
        raise ValueError(
            f"{folder}: names do not match. Not in the checkpoint: {sorted(missing)}. In the checkpoint but not asked "
            f"for: {sorted(unexpected)}; name them in ignore=(...), or pass ignore='rest'."
        )
    if set(objects) & ignored:
        raise ValueError(f"asked for and ignored at once: {sorted(set(objects) & ignored)}. Choose one.")
    for name, thing in objects.items():
        _check_kind(name, thing, stored[name])
    return [name for name in stored if name not in ignored]


def _ignored_names(ignore: str | frozenset[str], rest: set[str]) -> frozenset[str] | set[str]:
    if not isinstance(ignore, str):
        return ignore
    if ignore != "rest":
        raise ValueError(f"ignore must be a tuple of names or 'rest', got {ignore!r}. Write ({ignore!r},).")
    return rest


def _check_kind(name: str, thing: Any, stored: str) -> None:
    if name == GLOBAL_GENERATORS:
        raise ValueError(f"{name} are restored by themselves. Leave them out, or pass ignore=({name!r},).")
    if stored == VALUE:
        raise ValueError(f"{name} was saved as a plain value. Leave it out; it is returned in CheckpointInfo.extra.")
    if kind_of(thing) != stored:
        raise ValueError(f"{name} was saved as a {stored} object, got a {type(thing).__qualname__} ({kind_of(thing)}).")


def _decode(path: Path, manifest: Mapping[str, Any], names: Iterable[str]) -> dict[str, Any]:
    trees = {name: manifest["objects"][name]["tree"] for name in names}
    used: set[str] = set()
    unflatten(list(trees.values()), tensor=used.add)
    tensors = tensor_file.read(path, manifest["tensors"], used)
    return {name: unflatten(tree, tensor=tensors.__getitem__) for name, tree in trees.items()}


def _apply(objects: Mapping[str, Any], states: Mapping[str, Any]) -> None:
    """Set the state of every object, and of the global generators if they are among the states: all or none."""
    order = sorted(objects, key=lambda name: order_of(objects[name]))
    before = {name: snapshot(objects[name], name=name) for name in order}
    generators_before = global_states()
    touched: list[str] = []
    try:
        for name in order:
            touched.append(name)
            set_state(objects[name], states[name])
        if GLOBAL_GENERATORS in states:
            touched.append(GLOBAL_GENERATORS)
            set_global_states(states[GLOBAL_GENERATORS])
    except BaseException as cause:
        try:
            _roll_back({name: objects[name] for name in touched if name in objects}, before, cause)
        finally:
            set_global_states(generators_before)
        if not isinstance(cause, Exception):
            raise
        message = f"{touched[-1]} refused its state, and every object was put back as it was: {cause}"
        raise ValueError(message) from cause


def _roll_back(objects: Mapping[str, Any], before: Mapping[str, Any], cause: BaseException) -> None:
    """Give the objects their former states, in the order in which they were loaded."""
    refused: dict[str, str] = {}
    for name, thing in objects.items():
        try:
            set_state(thing, before[name])
        except Exception as failure:  # noqa: BLE001 - the others must still be put back; all are reported below
            refused[name] = str(failure)
    if refused:
        raise RuntimeError(
            f"loading failed ({cause}), and these objects refused the state that they had before, so that they are "
            f"neither: {refused}. Build them anew."
        ) from cause
