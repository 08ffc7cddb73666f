"""The files behind a data set: the folder where they lie, and the error for a damaged one."""

import os
from collections.abc import Callable, Sequence
from pathlib import Path

VARIABLE = "DYNARANK_DATA_DIR"


def locate(
    name: str,
    directory: str | os.PathLike[str] | None,
    *,
    missing: Callable[[Path], str],
    fetch: Callable[[Path], object] | None,
    subfolders: Sequence[str] = (),
) -> Path:
    """Return a folder that has all files of a data set, downloading them into the user's cache as a last resort.

    Every place is looked at itself and then in its subfolders. The order is: ``directory``, and nowhere else when it is
    given; the folder that the environment variable ``DYNARANK_DATA_DIR`` names; the user's cache,
    ``$XDG_CACHE_HOME/dynarank/NAME`` or ``~/.cache/dynarank/NAME``. It does not look into the files.

    Args:
        name: Name of the data set, which is the name of its cache folder and of its loader ``load_NAME``.
        directory: The only place to look at, or None to search.
        missing: Returns which files a folder lacks, for a message, or ``""`` if it has all of them.
        fetch: Downloads into a folder what it lacks, or raises RuntimeError or OSError; None forbids it.
        subfolders: Names of the subfolders, or empty for ``NAME`` alone.

    Raises:
        ValueError: If ``directory`` lacks a file.
        RuntimeError: If no folder has the files and they cannot be downloaded.

    Example:
        >>> locate("toy", "data", missing=lambda folder: "" if folder.name == "toy" else "toy.csv", fetch=None).parts
        ('data', 'toy')
        >>> locate("toy", "data", missing=lambda folder: "toy.csv", fetch=None)
        Traceback (most recent call last):
        ValueError: load_toy: directory 'data' has no toy.csv, and neither has its subfolder toy. Name the folder ...
    """
    subfolders = subfolders or (name,)
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "dynarank" / name
    named = os.environ.get(VARIABLE)
    searched = [cache] if named is None else [Path(named), cache]
    roots = searched if directory is None else [Path(directory)]
    for folder in (root / subfolder for root in roots for subfolder in ("", *subfolders)):
        if not missing(folder):
            return folder
    if directory is not None:
        raise ValueError(
            f"load_{name}: directory {str(directory)!r} has no {missing(Path(directory))}, and neither has its "
            f"subfolder {' or '.join(subfolders)}. Name the folder with the files, or leave it out to search and "
            "download."
        )
    try:
        if fetch is None:
            raise RuntimeError("download=False")
        fetch(cache)
    except (RuntimeError, OSError) as error:
        raise RuntimeError(
            f"load_{name}: the files are not in {' and '.join(map(str, searched))} and were not downloaded ({error}). "
            f"Name a folder that has them with directory, --data-dir or {VARIABLE}, or run once with a network "
            "connection."
        ) from error
    return cache


def damaged(where: str, what: str, got: object, expected: object) -> ValueError:
    """Return the error for a file whose contents are not what they should be.

    Example:
        >>> str(damaged("a/labels", "length in bytes", 75, 76))
        'a/labels: length in bytes must be 76, got 75. The file is damaged or another one: delete it and load again.'
    """
    return ValueError(
        f"{where}: {what} must be {expected}, got {got}. The file is damaged or another one: delete it and load again."
    )
