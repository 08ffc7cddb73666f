"""Laws of the IDX reader: a whole file reads as written, any damage is named."""

import gzip
import hashlib
import struct
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from dynarank.data.idx import IdxFile, read_idx

IMAGES = torch.arange(3 * 5 * 4, dtype=torch.uint8).reshape(3, 5, 4)
CONTENTS = struct.pack(">4B3I", 0, 0, 8, 3, 3, 5, 4) + bytes(IMAGES.flatten().tolist())
FILE = IdxFile("images-idx3-ubyte", shape=(3, 5, 4), sha256=hashlib.sha256(CONTENTS).hexdigest())
PACKED = gzip.compress(CONTENTS, mtime=0)


def write(folder: Path, contents: bytes, name: str = FILE.name) -> Path:
    path = folder / name
    path.write_bytes(contents)
    return path


@pytest.mark.parametrize("level", [None, 1, 9])
def test_contents_count_and_compression_does_not(level: int | None, tmp_path: Path):
    if level is None:
        path = write(tmp_path, CONTENTS)
    else:
        path = write(tmp_path, gzip.compress(CONTENTS, level, mtime=0), name=f"{FILE.name}.gz")
    assert FILE.find(tmp_path) == path
    assert torch.equal(read_idx(path, FILE), IMAGES)


@pytest.mark.parametrize(
    ("contents", "what"),
    [
        (b"", r"IDX magic number must be 00000803, got \."),
        (b"<html>not found</html>", "IDX magic number must be 00000803, got 3c68746d"),
        (CONTENTS[:9], "sizes in the header must be .* got a file that ends before them"),
        (CONTENTS[:4] + struct.pack(">3I", 4, 5, 4) + CONTENTS[16:], r"sizes in the header .* got \(4, 5, 4\)"),
        (CONTENTS[:-1], "length in bytes must be 76, got 75"),
        (CONTENTS + b"\0", "length in bytes must be 76, got 77"),
        (CONTENTS[:-1] + b"\0", "SHA-256 of the decompressed contents must be"),
        (PACKED[:-9], "gzip stream must be a complete stream, got an error"),
        (PACKED[:12] + b"\xff\xff" + PACKED[14:], "gzip stream must be"),
        (gzip.compress(CONTENTS[:-1], mtime=0), "length in bytes must be 76, got 75"),
    ],
)
def test_damage_is_named_with_file_and_remedy(contents: bytes, what: str, tmp_path: Path):
    path = write(tmp_path, contents)
    with pytest.raises(ValueError, match=what) as caught:
        read_idx(path, FILE)
    assert str(caught.value).startswith(f"{path}: ")
    assert str(caught.value).endswith("delete it and load again.")


def test_another_checksum_is_refused(tmp_path: Path):
    expected = hashlib.sha256(CONTENTS).hexdigest()
    with pytest.raises(ValueError, match=f"SHA-256 of the decompressed contents must be {'0' * 64}, got {expected}"):
        read_idx(write(tmp_path, CONTENTS), replace(FILE, sha256="0" * 64))


def test_a_missing_file_is_not_found(tmp_path: Path):
    assert FILE.find(tmp_path) is None
