"""Tiny Shakespeare, a megabyte of plays, from a folder, the user's cache or its public repository."""

import hashlib
import os
from dataclasses import dataclass
from pathlib import Path
from typing import final

from dynarank.data.download import download as download_file
from dynarank.data.files import damaged, locate
from dynarank.data.text import CharacterText

FILE = "input.txt"


@final
@dataclass(frozen=True)
class TextSource:
    """The SHA-256 of one text file, in hexadecimal, and its addresses on the web."""

    sha256: str
    mirrors: tuple[str, ...]


TINY_SHAKESPEARE = TextSource(
    sha256="86c4e6aa9db7c042ec79f339dcb96d42b0075e16b8fc2e86bf0ca57e2dc565ed",
    mirrors=("https://raw.githubusercontent.com/karpathy/char-rnn/master/data/tinyshakespeare/input.txt",),
)


def load_tiny_shakespeare(
    directory: str | os.PathLike[str] | None = None, *, download: bool = True, _source: TextSource = TINY_SHAKESPEARE
) -> CharacterText:
    """Load Tiny Shakespeare: 1,115,394 characters, 65 different ones, split in order into 90 % / 5 % / 5 %.

    The file ``input.txt`` is looked for in this order, each time in the folder itself and in its subfolders
    ``tinyshakespeare`` and ``tiny_shakespeare``: ``directory``, and nowhere else when it is given; the folder that the
    environment variable ``DYNARANK_DATA_DIR`` names; the user's cache, ``$XDG_CACHE_HOME/dynarank/tiny_shakespeare`` or
    ``~/.cache/dynarank/tiny_shakespeare``. Otherwise it is downloaded into the cache. It is checked by SHA-256 in every
    load.

    Args:
        directory: Folder with the file, or None to search.
        download: Whether the public repository may be asked when no folder has the file.

    Shape:
        - train: ``(1003854,)``, validation: ``(55770,)``, test: ``(55770,)``, int64.

    Raises:
        ValueError: If ``directory`` lacks the file, or the file is damaged.
        RuntimeError: If no folder has the file and it cannot be downloaded.

    Example:
        >>> load_tiny_shakespeare("no-such-folder")
        Traceback (most recent call last):
        ValueError: load_tiny_shakespeare: directory 'no-such-folder' has no input.txt, ...

    Reference:
        A. Karpathy, char-rnn, 2015, https://github.com/karpathy/char-rnn, file data/tinyshakespeare/input.txt. The
        shares of the three parts are ours.
    """

    def check(contents: bytes, where: str) -> str:
        sha256 = hashlib.sha256(contents).hexdigest()
        if sha256 != _source.sha256:
            raise damaged(where, "SHA-256 of the contents", sha256, _source.sha256)
        return contents.decode()

    def fetch(cache: Path) -> None:
        download_file(_source.mirrors, cache / FILE, check=check)

    folder = locate(
        "tiny_shakespeare",
        directory,
        missing=lambda folder: "" if (folder / FILE).is_file() else FILE,
        fetch=fetch if download else None,
        subfolders=("tinyshakespeare", "tiny_shakespeare"),
    )
    path = folder / FILE
    return CharacterText.from_text(check(path.read_bytes(), str(path)))
