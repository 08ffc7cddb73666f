"""Files that are there whole or not at all: written beside their place, brought down to the disk, then moved."""

import errno
import os
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Yield a path beside ``path`` to write to; at the end that file takes its place in one atomic move.

    Until then, and after any failure, ``path`` is as it was. Missing folders are made. What a killed process left
    behind is removed by the next one that writes the same file.

    Raises:
        OSError: Writing fails.

    Example:
        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     path = Path(folder, "a.txt")
        ...     with replacing(path) as partial:
        ...         size = partial.write_text("whole")
        ...     path.read_text(), len(list(path.parent.iterdir()))
        ('whole', 1)
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    mark = f".{path.name}.partial-"
    partial = path.with_name(f"{mark}{uuid.uuid4().hex}{path.suffix}")
    try:
        yield partial
        with partial.open("r+b") as file:
            os.fsync(file.fileno())
        os.replace(partial, path)
        sync_folder(path.parent)
    finally:
        for left in [entry for entry in path.parent.iterdir() if entry.name.startswith(mark)]:
            left.unlink(missing_ok=True)


def sync_folder(directory: Path) -> None:
    """Bring the names in a folder down to the disk, where the system can."""
    if os.name == "nt":
        return  # a folder cannot be opened there
    descriptor = os.open(directory, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as cause:
        if cause.errno not in (errno.EINVAL, errno.ENOTSUP):  # some network file systems do not know it
            raise
    finally:
        os.close(descriptor)
