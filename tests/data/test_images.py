"""Laws of the reader of labelled images: a whole file reads as written, any damage is named."""

import io
import sys
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest
import torch
from PIL import Image

from dynarank.data.images import ImageFile, decode_images, parse_rows, read_images

ROWS, SIZE = 6, (7, 5)
FILE = ImageFile("small.parquet", rows=ROWS, size=SIZE, classes=3)
IMAGES = torch.randint(256, (ROWS, 3, *SIZE), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
LABELS = [0, 1, 2, 2, 1, 0]


def encode(image: torch.Tensor, kind: str = "PNG", mode: str = "RGB") -> bytes:
    pixels = bytes(image.permute(1, 2, 0).flatten().tolist())
    file = io.BytesIO()
    Image.frombytes("RGB", (image.shape[2], image.shape[1]), pixels).convert(mode).save(file, format=kind)
    return file.getvalue()


PNG = [encode(image) for image in IMAGES]


def to_parquet(images: list, labels: list, **names: str) -> bytes:
    cells = [None if image is None else {"bytes": image, "path": f"{row}.png"} for row, image in enumerate(images)]
    table = pyarrow.table({names.get("img", "img"): cells, names.get("label", "label"): labels})
    file = io.BytesIO()
    pyarrow.parquet.write_table(table, file)
    return file.getvalue()


CONTENTS = to_parquet(PNG, LABELS)


def test_a_file_reads_as_written(tmp_path: Path):
    path = tmp_path / FILE.name
    path.write_bytes(CONTENTS)
    images, labels = read_images(path, FILE)
    assert torch.equal(images, IMAGES)
    assert images.is_contiguous()
    assert torch.equal(labels, torch.tensor(LABELS))


def test_jpeg_reads_up_to_its_loss():
    smooth = torch.linspace(0, 255, 35).reshape(1, 1, *SIZE).expand(1, 3, *SIZE).byte()
    decoded = decode_images([encode(smooth[0], "JPEG")], SIZE, where="memory")
    torch.testing.assert_close(decoded.float(), smooth.float(), atol=8, rtol=0)


def test_columns_of_no_concern_are_passed_over():
    table = pyarrow.parquet.read_table(pyarrow.BufferReader(CONTENTS)).append_column("more", [LABELS])
    file = io.BytesIO()
    pyarrow.parquet.write_table(table, file)
    assert parse_rows(file.getvalue(), FILE, where="memory") == (PNG, LABELS)


@pytest.mark.parametrize(
    ("contents", "what"),
    [
        (b"", "contents must be a parquet file, got an error"),
        (b"<html>not found</html>", "contents must be a parquet file, got an error"),
        (CONTENTS[:-9], "contents must be a parquet file, got an error"),
        (to_parquet(PNG, LABELS, img="image"), "columns must be img of bytes .* got .*'image.bytes': 'binary'"),
        (to_parquet(PNG, LABELS, label="class"), r"columns must be .* and label \(int64\), got .*'class': 'int64'"),
        (to_parquet(["text"] * ROWS, LABELS), "columns must be .* got .*'img.bytes': 'string'"),
        (to_parquet(PNG, list("012210")), "columns must be .* got .*'label': 'string'"),
        (to_parquet(PNG[:-1], LABELS[:-1]), "number of rows must be 6, got 5"),
        (to_parquet(PNG, [*LABELS[:-1], 3]), "labels must be between 0 and 2, got 3"),
        (to_parquet(PNG, [*LABELS[:-1], -1]), "labels must be between 0 and 2, got -1"),
        (to_parquet(PNG, [*LABELS[:-1], None]), "labels must be between 0 and 2, got None"),
        (to_parquet([*PNG[:-1], None], LABELS), "image of row 5 must be a PNG or JPEG"),
        (to_parquet([b"", *PNG[1:]], LABELS), "image of row 0 must be a PNG or JPEG"),
        (to_parquet([*PNG[:2], PNG[2][:-30], *PNG[3:]], LABELS), "image of row 2 must be a PNG or JPEG"),
        (to_parquet([*PNG[:-1], encode(IMAGES[0].mT)], LABELS), "row 5 must be .* RGB of 7 x 5, got RGB of 5 x 7"),
        (to_parquet([*PNG[:-1], encode(IMAGES[0], mode="L")], LABELS), "row 5 must be .* got L of 7 x 5"),
        (to_parquet([*PNG[:-1], encode(IMAGES[0], "GIF")], LABELS), "image of row 5 must be a PNG or JPEG"),
    ],
)
def test_damage_is_named_with_file_and_remedy(contents: bytes, what: str, tmp_path: Path):
    path = tmp_path / FILE.name
    path.write_bytes(contents)
    with pytest.raises(ValueError, match=what) as caught:
        read_images(path, FILE)
    assert str(caught.value).startswith(f"{path}: ")
    assert str(caught.value).endswith("delete it and load again.")


def test_a_header_that_claims_gigabytes_is_refused_before_decoding():
    huge = bytearray(PNG[0])
    huge[16:24] = (30_000).to_bytes(4, "big") * 2  # width and height
    with pytest.raises(ValueError, match="image of row 0 must be a PNG or JPEG"):
        decode_images([bytes(huge)], SIZE, where="memory")


@pytest.mark.parametrize("package", ["pyarrow", "pyarrow.parquet", "PIL"])
def test_a_missing_extra_gives_one_line(package: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    path = tmp_path / FILE.name
    path.write_bytes(CONTENTS)
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(ImportError, match=r'pip install "dynarank\[data\]"'):
        read_images(path, FILE)
