"""Save a training run, or the weights of one model."""

import operator
import os
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
from torch import nn

from dynarank.checkpoint.folder import commit
from dynarank.checkpoint.objects import GENERATOR, GLOBAL_GENERATORS, global_states, kind_of, state_of
from dynarank.checkpoint.tree import flatten

# The names of keyword arguments of save and load, which an object could therefore not be asked for by.
_RESERVED = ("directory", "step", "ignore", GLOBAL_GENERATORS)


def save(directory: str | os.PathLike[str], *, step: int = 0, global_generators: bool = True, **objects: Any) -> None:
    """Save a whole training run into a folder, as tensors and JSON, in place of the checkpoint that is there.

    At every instant the folder holds one complete checkpoint, the old or the new one, whatever interrupts the writing.
    In a distributed run one process calls this; the generators of the others are theirs to pass. Python's and numpy's
    generators are not saved.

    Args:
        directory: The folder. It is made if needed; files of others in it are left alone.
        step: Number of optimizer steps taken.
        global_generators: Whether to save torch's global generators, of the CPU and of CUDA if it is in use.
        objects: By name, what has ``state_dict`` and ``load_state_dict``, ``torch.Generator``s, and plain values:
            nested dicts, lists and tuples of numbers, strings, None and tensors. Tensors are saved by value: neither
            ``requires_grad`` nor the device is kept. They must not change while this runs.

    Raises:
        TypeError: If a state holds something else; the message names its path. Nothing was written.
        ValueError: If there is nothing to save, or a name or the step is not allowed. Nothing was written.
        OSError: If writing fails. The checkpoint that was there is still there.

    Example:
        >>> import tempfile
        >>> model = nn.Linear(3, 2)
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     save(folder, step=7, model=model, config={"rank": 2})
        ...     sorted(path.name.partition("-")[0] for path in Path(folder).iterdir())
        ['manifest.json', 'tensors']
    """
    step = operator.index(step)
    _check_arguments(step, objects)
    content: dict[str, Any] = {"dynarank": _library_version(), "torch": torch.__version__, "step": step, "objects": {}}
    tensors: dict[str, torch.Tensor] = {}
    states = [(name, kind_of(thing), state_of(thing)) for name, thing in objects.items()]
    if global_generators:
        states.append((GLOBAL_GENERATORS, GENERATOR, global_states()))
    for name, kind, state in states:
        tree, found = flatten(state, name=name)
        content["objects"][name] = {"kind": kind, "tree": tree}
        tensors |= found
    commit(Path(directory), content=content, tensors=tensors)


def save_model(directory: str | os.PathLike[str], model: nn.Module, **metadata: Any) -> None:
    """Save the weights of a model, without optimizer or generators, for `load_model`.

    Args:
        directory: The folder, as in `save`.
        model: The model.
        metadata: Plain values to keep with it, returned by `load_model` in ``extra["metadata"]``.

    Raises:
        TypeError: If the state or the metadata holds something that a checkpoint cannot hold.
        OSError: If writing fails. The checkpoint that was there is still there.

    Example:
        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     save_model(folder, nn.Linear(3, 2), accuracy=0.99)
    """
    save(directory, global_generators=False, model=model, metadata=metadata)


def _check_arguments(step: int, objects: dict[str, Any]) -> None:
    if step < 0:
        raise ValueError(f"step must be at least 0, got {step}.")
    if not objects:
        raise ValueError("save got nothing to save. Pass objects by name: save(directory, model=model).")
    wrong = [name for name in objects if name in _RESERVED or not name.isidentifier()]
    if wrong:
        raise ValueError(f"names of objects must be identifiers other than {', '.join(_RESERVED)}; got {wrong}.")


def _library_version() -> str:
    try:
        return metadata.version("dynarank")
    except metadata.PackageNotFoundError:
        return "unknown"  # run from a source tree that is not installed
