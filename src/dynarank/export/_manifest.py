"""The manifest of a compressed model: what may be in it, and which one belongs to the tensor file that is there."""

import errno
import hashlib
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from dynarank._files import replacing

FORMAT = "dynarank.compressed"
VERSION = 1
MANIFEST = "dynarank.json"
TENSORS = "model.safetensors"
_KEYS = {"structure": dict, "shared": dict, "metadata": dict, "bytes": int, "sha256": str}


def read_manifest(folder: str | os.PathLike[str]) -> dict[str, Any]:
    """Return what a compressed model says about itself, after checking its files; see `dynarank.export`.

    Raises:
        FileNotFoundError: The folder holds no compressed model.
        ValueError: The files are damaged, of another format or of an unknown version.
    """
    directory = Path(folder)
    path, tensors = directory / MANIFEST, directory / TENSORS
    if not path.is_file():
        raise FileNotFoundError(errno.ENOENT, f"{directory} holds no compressed model: {MANIFEST} is missing.")
    try:
        manifest = json.loads(path.read_bytes())
    except (ValueError, RecursionError) as cause:
        raise ValueError(f"{path} is damaged: {cause}. Copy it again.") from cause
    _check(path, manifest)
    if not tensors.is_file():
        raise FileNotFoundError(errno.ENOENT, f"{directory} holds no compressed model: {TENSORS} is missing.")
    found = digest(tensors)
    for candidate in (manifest, manifest.get("previous")):
        if candidate is not None and candidate["sha256"] == found:
            return {key: value for key, value in candidate.items() if key != "previous"}
    raise ValueError(f"{tensors} is damaged: its SHA-256 is not that of the manifest. Copy it again.")


def model_before(directory: Path) -> dict[str, Any] | None:
    """Return the manifest of the model in the folder, or None; refuse to overwrite what is not ours to lose."""
    if (directory / TENSORS).exists() and not (directory / MANIFEST).exists():
        raise FileExistsError(errno.EEXIST, f"{directory} holds a {TENSORS} of someone else. Name another folder.")
    try:
        return read_manifest(directory)
    except FileNotFoundError:
        return None


def write_manifest(directory: Path, manifest: Mapping[str, Any]) -> None:
    """Write a manifest in place of the one that is there."""
    with replacing(directory / MANIFEST) as partial:
        partial.write_text(json.dumps(manifest, indent=1, allow_nan=False), encoding="utf-8")


def digest(path: Path) -> str:
    """Return the SHA-256 of a file."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _check(path: Path, manifest: Any) -> None:
    if not isinstance(manifest, dict) or manifest.get("format") != FORMAT:
        raise ValueError(f"{path} is no manifest of a {FORMAT} model.")
    if manifest.get("version") != VERSION:
        raise ValueError(
            f"{path}: unknown version {manifest.get('version')!r}. Available: {VERSION}. "
            f"It was written by dynarank {manifest.get('dynarank')!r}; load it with that release or a newer one."
        )
    for key, kind in _KEYS.items():
        if type(manifest.get(key)) is not kind:
            raise ValueError(f"{path}: {key!r} must be a {kind.__name__}, got {str(manifest.get(key))[:80]}.")
    if manifest.get("previous") is not None:
        _check(path, manifest["previous"])
