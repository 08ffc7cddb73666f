"""Reading one IDX file, with every check that tells a whole file from a damaged one."""

import gzip
import hashlib
import math
import struct
import zlib
from dataclasses import dataclass
from pathlib import Path
from typing import final

import torch

from dynarank.data.files import damaged

UNSIGNED_BYTE = 8  # IDX code of the only element type used here
GZIP_MAGIC = b"\x1f\x8b"


@final
@dataclass(frozen=True)
class IdxFile:
    """What one IDX file of unsigned bytes must be.

    Args:
        name: File name without ``.gz``.
        shape: Sizes that the header must state.
        sha256: Hexadecimal SHA-256 of the decompressed contents, header included. The compressed bytes do not count:
            the same contents compress differently from tool to tool.

    Example:
        >>> IdxFile("labels-idx1-ubyte", shape=(3,), sha256="00").candidates(Path("data"))[0].name
        'labels-idx1-ubyte.gz'
    """

    name: str
    shape: tuple[int, ...]
    sha256: str

    def candidates(self, folder: Path) -> tuple[Path, Path]:
        """Return the two paths where the file may lie in ``folder``: compressed and plain."""
        return folder / f"{self.name}.gz", folder / self.name

    def find(self, folder: Path) -> Path | None:
        """Return the first of `candidates` that exists, or None."""
        return next((path for path in self.candidates(folder) if path.is_file()), None)


def read_idx(path: Path, file: IdxFile) -> torch.Tensor:
    """Read an IDX file, compressed or plain, and check it against its description.

    Args:
        path: The file.
        file: What it must be.

    Shape:
        ``file.shape``, uint8.

    Raises:
        ValueError: If the file is cut, damaged or another file.

    Example:
        >>> import tempfile
        >>> contents = bytes([0, 0, 8, 1, 0, 0, 0, 3, 7, 8, 9])
        >>> file = IdxFile("labels-idx1-ubyte", shape=(3,), sha256=hashlib.sha256(contents).hexdigest())
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     path = Path(folder, file.name)
        ...     _ = path.write_bytes(contents)
        ...     read_idx(path, file)
        tensor([7, 8, 9], dtype=torch.uint8)
    """
    return parse_idx(path.read_bytes(), file, where=str(path))


def parse_idx(contents: bytes, file: IdxFile, *, where: str) -> torch.Tensor:
    """Turn the bytes of an IDX file into a tensor; the checks go from the cheapest to the strictest.

    Args:
        contents: Bytes of the file, compressed by gzip or plain.
        file: What it must be.
        where: Path or address, for messages.

    Shape:
        ``file.shape``, uint8.

    Raises:
        ValueError: If the bytes do not decompress, or if type code, sizes, length or checksum differ.

    Reference:
        Y. LeCun, C. Cortes, C. J. C. Burges, The MNIST database of handwritten digits, section "File formats".
    """
    contents = _decompress(contents, where=where)
    dimensions = len(file.shape)
    header = struct.pack(f">4B{dimensions}I", 0, 0, UNSIGNED_BYTE, dimensions, *file.shape)
    if contents[:4] != header[:4]:
        raise damaged(where, "IDX magic number", contents[:4].hex(), header[:4].hex())
    if contents[: len(header)] != header:
        raise damaged(where, "sizes in the header", _sizes(contents, dimensions), file.shape)
    if len(contents) != len(header) + math.prod(file.shape):
        raise damaged(where, "length in bytes", len(contents), len(header) + math.prod(file.shape))
    sha256 = hashlib.sha256(contents).hexdigest()
    if sha256 != file.sha256:
        raise damaged(where, "SHA-256 of the decompressed contents", sha256, file.sha256)
    # bytearray, not bytes: torch warns about a buffer that cannot be written.
    return torch.frombuffer(bytearray(contents), dtype=torch.uint8, offset=len(header)).reshape(file.shape)


def _decompress(contents: bytes, *, where: str) -> bytes:
    if not contents.startswith(GZIP_MAGIC):
        return contents
    try:
        return gzip.decompress(contents)
    except (EOFError, OSError, zlib.error) as error:
        raise damaged(where, "gzip stream", f"an error ({error})", "a complete stream") from error


def _sizes(contents: bytes, dimensions: int) -> tuple[int, ...] | str:
    header = contents[4 : 4 + 4 * dimensions]
    return struct.unpack(f">{dimensions}I", header) if len(header) == 4 * dimensions else "a file that ends before them"
