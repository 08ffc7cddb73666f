"""The folder of a checkpoint: one manifest, one tensor file, and a commit that cannot be seen half done.

The tensor file is named after its content. `manifest.json` names it, and replacing the manifest is the commit: until
that instant the folder holds the old checkpoint, from then on the new one. Files without a name in it are then removed.
"""

import contextlib
import errno
import hashlib
import json
import os
import re
import uuid
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, BinaryIO

from torch import Tensor

from dynarank._files import sync_folder
from dynarank.checkpoint import tensors as tensor_file

FORMAT = "dynarank.checkpoint"
VERSION = 1
MANIFEST = "manifest.json"
_PARTIAL = ".partial-"
_TENSOR_FILE = re.compile(r"tensors-[0-9a-f]{16}\.safetensors")
_KEYS = {"step": int, "tensor_file": dict, "tensors": dict, "objects": dict, "checksum": str}
_FILE_KEYS = {"name": str, "bytes": int, "sha256": str}


def commit(directory: Path, *, content: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> None:
    """Write tensors and manifest, then make them the checkpoint of the folder.

    Args:
        directory: The folder; it is made if it does not exist, and other files in it are left alone.
        content: What the manifest says beyond format, version, tensor file and checksum.
        tensors: What the tensor file holds.

    Raises:
        OSError: If writing fails. The folder still holds the complete checkpoint that it held before.
    """
    settled = True
    try:
        _make_folder(directory)
        entry = _write_tensors(directory, tensors)
        specs = {name: tensor_file.describe(tensor) for name, tensor in tensors.items()}
        manifest = {"format": FORMAT, "version": VERSION, **content, "tensor_file": entry, "tensors": specs}
        manifest["checksum"] = checksum(manifest)
        partial, _, _ = _write_partial(directory, [json.dumps(manifest, indent=1, allow_nan=False).encode()])
        sync_folder(directory)  # the tensor file must be on the disk before a manifest that names it
        os.replace(partial, directory / MANIFEST)
        settled = False  # after a loss of power either manifest may be there, so both tensor files are needed
        sync_folder(directory)
        settled = True
    except OSError as cause:
        state = "still holds its last complete checkpoint" if (directory / MANIFEST).is_file() else "holds none yet"
        outcome = "was not saved" if settled else "may be lost if power fails"
        message = f"{directory}: the checkpoint {outcome} ({cause.strerror or cause}); the folder {state}."
        raise OSError(cause.errno or errno.EIO, message) from cause
    finally:
        if settled:
            _remove_stale(directory)


def read_manifest(directory: Path) -> dict[str, Any]:
    """Return the manifest of a checkpoint, checked as far as that is possible without the tensor file.

    Raises:
        FileNotFoundError: If the folder holds no checkpoint.
        ValueError: If the manifest is damaged, of another format or of an unknown version.
    """
    path = directory / MANIFEST
    try:
        manifest = json.loads(path.read_bytes())
    except FileNotFoundError as cause:
        raise FileNotFoundError(errno.ENOENT, f"{directory} holds no checkpoint: {MANIFEST} is missing.") from cause
    except (ValueError, RecursionError) as cause:
        raise ValueError(f"{path} is damaged: {cause}. Load another checkpoint.") from cause
    _check_manifest(path, manifest)
    return manifest


def check_tensor_file(directory: Path, manifest: Mapping[str, Any]) -> Path:
    """Check the tensor file against the manifest, every byte of it, and return its path.

    Raises:
        FileNotFoundError: If the file is missing.
        ValueError: If it lies outside the folder, is cut short or damaged, or holds other tensors than declared.
    """
    entry = manifest["tensor_file"]
    path = directory / entry["name"]
    if path.resolve().parent != directory.resolve():
        raise ValueError(f"{path} leads out of the folder, to {path.resolve()}. Copy the file itself into the folder.")
    with path.open("rb") as file:
        size, digest = os.fstat(file.fileno()).st_size, ""
        if size == entry["bytes"]:
            digest = hashlib.file_digest(file, "sha256").hexdigest()
    if size != entry["bytes"]:
        fault = f"{size} bytes long instead of {entry['bytes']}"
        raise ValueError(f"{path} is {fault}: it was cut short or replaced. Copy it again, or load another checkpoint.")
    if digest != entry["sha256"]:
        raise ValueError(f"{path} is damaged: its SHA-256 is not that of the manifest. Load another checkpoint.")
    tensor_file.check_file(path, manifest["tensors"])
    return path


def checksum(manifest: Mapping[str, Any]) -> str:
    """Return the SHA-256 of everything else in a manifest, as compact JSON.

    Example:
        >>> checksum({"step": 3}) == checksum({"step": 3, "checksum": "ignored"}) != checksum({"step": 4})
        True
    """
    content = {key: value for key, value in manifest.items() if key != "checksum"}
    return hashlib.sha256(json.dumps(content, separators=(",", ":")).encode()).hexdigest()


def _check_manifest(path: Path, manifest: Any) -> None:
    if not isinstance(manifest, dict) or manifest.get("format") != FORMAT:
        raise ValueError(f"{path} is no manifest of a {FORMAT}.")
    if manifest.get("version") != VERSION:
        raise ValueError(
            f"{path}: unknown version {manifest.get('version')!r}. Available: {VERSION}. "
            f"It was written by dynarank {manifest.get('dynarank')!r}; load it with that release or a newer one."
        )
    _check_types(path, manifest, _KEYS)
    _check_types(path, manifest["tensor_file"], _FILE_KEYS)
    name = manifest["tensor_file"]["name"]
    if not _TENSOR_FILE.fullmatch(name):
        raise ValueError(f"{path}: the tensor file must be named tensors-<16 hex digits>.safetensors, got {name!r}.")
    if checksum(manifest) != manifest["checksum"]:
        raise ValueError(f"{path} is damaged: its checksum does not match. Load another checkpoint.")
    for tensor, spec in manifest["tensors"].items():
        try:
            tensor_file.check_spec(spec)
        except ValueError as cause:
            raise ValueError(f"{path}: tensor {tensor!r}: {cause}") from cause


def _check_types(path: Path, entries: Mapping[str, Any], kinds: Mapping[str, type]) -> None:
    for key, kind in kinds.items():
        if type(entries.get(key)) is not kind:
            raise ValueError(f"{path}: {key!r} must be a {kind.__name__}, got {str(entries.get(key))[:80]}.")


def _make_folder(directory: Path) -> None:
    if not directory.is_dir():
        directory.mkdir(parents=True)
        sync_folder(directory.parent)


def _write_tensors(directory: Path, tensors: Mapping[str, Tensor]) -> dict[str, Any]:
    """Write the tensor file under the name of its content and return its entry in the manifest."""
    partial, size, digest = _write_partial(directory, tensor_file.pieces(tensors))
    name = f"tensors-{digest[:16]}.safetensors"
    os.replace(partial, directory / name)
    return {"name": name, "bytes": size, "sha256": digest}


def _write_partial(directory: Path, pieces: Iterable[bytes | memoryview]) -> tuple[Path, int, str]:
    """Write a file that no manifest names, down to the disk; return its path, length and SHA-256."""
    path = directory / f"{_PARTIAL}{uuid.uuid4().hex}"
    size, digest = 0, hashlib.sha256()
    with path.open("xb") as file:
        for piece in pieces:
            _write(file, piece)
            size += len(piece)
            digest.update(piece)
        file.flush()
        os.fsync(file.fileno())
    return path, size, digest.hexdigest()


def _write(file: BinaryIO, piece: bytes | memoryview) -> None:
    file.write(piece)


def _remove_stale(directory: Path) -> None:
    """Remove what a commit left behind: partial files and tensor files that the manifest does not name."""
    # A file that cannot be removed costs space, not correctness, and the next commit tries again.
    with contextlib.suppress(OSError):
        for path in list(_stale(directory)):
            path.unlink(missing_ok=True)


def _stale(directory: Path) -> Iterator[Path]:
    yield from directory.glob(f"{_PARTIAL}*")
    try:
        current = read_manifest(directory)["tensor_file"]["name"]
    except FileNotFoundError:
        current = None
    except ValueError:
        return  # a manifest that cannot be read may name any of them
    for path in directory.glob("tensors-*.safetensors"):
        if _TENSOR_FILE.fullmatch(path.name) and path.name != current:
            yield path
