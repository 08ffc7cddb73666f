"""A model saved with its factors, and loaded into the dense architecture."""

import json
import os
from collections.abc import Mapping
from importlib import metadata as packages
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from dynarank._files import replacing
from dynarank.export._manifest import FORMAT, TENSORS, VERSION, digest, model_before, read_manifest, write_manifest
from dynarank.export._tensors import check_fits, distinct, fill_, write_tensors
from dynarank.factorize.sites import put_in_place
from dynarank.factorize.structure import plan_structure, structure


def save_compressed(folder: str | os.PathLike[str], model: nn.Module, **metadata: Any) -> None:
    """Save a model with its factors, its structure and its metadata, for `load_compressed` and the dense architecture.

    At every instant the folder holds one complete model, the one before or the new one, whatever interrupts the
    writing. Values are kept bit for bit, spare rows of factors included; gradients, devices and training modes are not
    saved.

    Args:
        folder: The folder. It is made if needed, a compressed model in it is replaced, other files are left alone.
        model: Any model; usually one that was factorised or compressed.
        metadata: Values for JSON, returned by `read_manifest` in ``"metadata"``.

    Raises:
        TypeError: The state dict holds something else than tensors with values, or the metadata are no JSON values.
        RuntimeError: The model is wrapped for distributed training.
        FileExistsError: The folder holds a ``model.safetensors`` of someone else.
        ValueError: The compressed model in the folder is damaged or of an unknown version, and is not overwritten.
        OSError: Writing fails. The model that was there is still there.

    Example:
        >>> import tempfile
        >>> from dynarank.factorize import factorize_
        >>> compressed = nn.Sequential(nn.Linear(64, 48), nn.ReLU(), nn.Linear(48, 10))
        >>> report = factorize_(compressed, rank=4)
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     save_compressed(folder, compressed, accuracy=0.99)
        ...     model = load_compressed(folder, nn.Sequential(nn.Linear(64, 48), nn.ReLU(), nn.Linear(48, 10)))
        >>> model[0]
        LowRankLinear(in_features=64, out_features=48, bias=True, rank=4)
    """
    if isinstance(model, DistributedDataParallel):
        raise RuntimeError("save_compressed got a model wrapped by DistributedDataParallel. Pass model.module.")
    directory = Path(folder)
    tensors, shared = distinct(model.state_dict())
    content = {"format": FORMAT, "version": VERSION, "dynarank": _library_version(), "torch": str(torch.__version__)}
    content |= {"structure": structure(model), "shared": shared, "metadata": _checked(metadata)}
    before = model_before(directory)
    with replacing(directory / TENSORS) as partial:
        write_tensors(partial, tensors)
        content |= {"bytes": partial.stat().st_size, "sha256": digest(partial)}
        # From here on the checksum decides which of the two manifests counts; the move of the tensors is the commit.
        write_manifest(directory, content | {"previous": before})
    write_manifest(directory, content)


def load_compressed(folder: str | os.PathLike[str], model: nn.Module) -> nn.Module:
    """Load what `save_compressed` wrote into the dense architecture, and return it with the factors.

    The outputs are those of the model that was saved, bit for bit on the same machine and in the same mode. The model
    takes the dtypes of the file; it keeps its devices and modes, and what is on the meta device comes to the CPU.

    Args:
        folder: The folder.
        model: The architecture before compression, with any weights, changed in place; or with the structure already.

    Raises:
        FileNotFoundError: The folder holds no compressed model.
        ValueError: The files are damaged or of an unknown version, or the model is of another architecture. The model
            is unchanged.
        RuntimeError: The model is wrapped for distributed training.
    """
    directory = Path(folder)
    manifest = read_manifest(directory)
    tensors = load_file(directory / TENSORS)
    state = tensors | {name: tensors[owner] for name, owner in manifest["shared"].items() if owner in tensors}
    new = plan_structure(model, manifest["structure"])
    put_in_place(model, new, verb="load_compressed")
    try:
        check_fits(model, state)
    except ValueError:
        put_in_place(model, {now: before for before, now in new.items()}, verb="load_compressed")
        raise
    fill_(model, state)
    return model


def _checked(metadata: Mapping[str, Any]) -> dict[str, Any]:
    for key, value in metadata.items():
        try:
            same = json.loads(json.dumps(value, allow_nan=False)) == value
        except (TypeError, ValueError, RecursionError):
            same = False
        if not same:
            raise TypeError(f"metadata {key!r}: {str(value)[:80]} does not come back from JSON as it is.")
    return dict(metadata)


def _library_version() -> str:
    try:
        return packages.version("dynarank")
    except packages.PackageNotFoundError:
        return "unknown"  # run from a source tree that is not installed
