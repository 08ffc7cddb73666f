"""Fetching one checked file from the first mirror that has it."""

import http.client
import os
import tempfile
import urllib.request
from collections.abc import Callable, Sequence
from pathlib import Path

TIMEOUT = 30.0  # seconds without an answer before the next mirror is tried


def download(urls: Sequence[str], path: Path, *, check: Callable[[bytes, str], object]) -> None:
    """Download a file from the first address that delivers it whole, and put it at ``path`` in one atomic move.

    A file at ``path`` is therefore always complete and checked, also when the run is killed half-way or several
    processes download at once. The file is held in memory in between. An existing file is replaced.

    Args:
        urls: Addresses of the same contents, tried in order.
        path: Where the file goes; missing folders are made.
        check: Called with the bytes and their address; raises ValueError if they are not what they should be.

    Raises:
        RuntimeError: If no address delivered the file; the message lists the reason of each.
        OSError: If the file cannot be written.

    Example:
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     source, copy = Path(folder, "a"), Path(folder, "b")
        ...     _ = source.write_bytes(b"contents")
        ...     download([source.as_uri()], copy, check=lambda contents, url: None)
        ...     copy.read_bytes()
        b'contents'
    """
    failures = []
    for url in urls:
        try:
            contents = _fetch(url)
            check(contents, url)
        except (OSError, http.client.HTTPException, ValueError) as error:
            failures.append(f"{url}: {error}")
        else:
            return _write_atomically(path, contents)
    raise RuntimeError(f"no mirror delivered {path.name}: " + "; ".join(failures))


def _fetch(url: str) -> bytes:
    with urllib.request.urlopen(url, timeout=TIMEOUT) as response:
        return response.read()


def _write_atomically(path: Path, contents: bytes) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    # The temporary file lies in the same folder: a rename is atomic only within one file system.
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(contents)
        os.replace(temporary, path)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise
