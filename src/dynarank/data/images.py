"""Reading one parquet file of labelled images, with every check that tells a whole file from a damaged one."""

import io
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import final

import torch

from dynarank.data.files import damaged
from dynarank.errors import missing_extra


@final
@dataclass(frozen=True)
class ImageFile:
    """What one parquet file must be: RGB images in the column ``img {bytes, path}``, classes in the column ``label``.

    There is no checksum: the same images compress differently from tool to tool, and may be PNG or JPEG.

    Args:
        name: File name.
        rows: Number of images.
        size: Height and width of every image, in pixels.
        classes: Number of classes; labels count from 0.

    Example:
        >>> ImageFile("test.parquet", rows=10_000, size=(32, 32), classes=10).name
        'test.parquet'
    """

    name: str
    rows: int
    size: tuple[int, int]
    classes: int


def read_images(path: Path, file: ImageFile) -> tuple[torch.Tensor, torch.Tensor]:
    """Read and decode the images of a parquet file and their labels, and check them against its description.

    Args:
        path: The file.
        file: What it must be.

    Shape:
        - images: ``(rows, 3, *size)``, uint8.
        - labels: ``(rows,)``, int64.

    Raises:
        ImportError: If pyarrow or pillow is not installed.
        ValueError: If the file is cut, damaged or another file.
    """
    encoded, labels = parse_rows(path.read_bytes(), file, where=str(path))
    return decode_images(encoded, file.size, where=str(path)), torch.tensor(labels)


def parse_rows(contents: bytes, file: ImageFile, *, where: str) -> tuple[list[bytes], list[int]]:
    """Turn the bytes of a parquet file into encoded images and labels. It does not decode the images.

    Args:
        contents: Bytes of the file.
        file: What it must be.
        where: Path or address, for messages.

    Raises:
        ImportError: If pyarrow is not installed.
        ValueError: If the bytes are not parquet, or if columns, number of rows or labels differ.
    """
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError as error:
        raise missing_extra("pyarrow", "data") from error
    try:
        table = pyarrow.parquet.read_table(pyarrow.BufferReader(contents)).flatten()  # img.bytes, img.path, label
    except (pyarrow.ArrowException, OSError) as error:
        raise damaged(where, "contents", f"an error ({error})", "a parquet file") from error
    columns = {field.name: str(field.type) for field in table.schema}
    if not columns.items() >= {"img.bytes": "binary", "label": "int64"}.items():
        raise damaged(where, "columns", columns, "img of bytes (binary) and path, and label (int64)")
    if len(table) != file.rows:
        raise damaged(where, "number of rows", len(table), file.rows)
    labels = table["label"].to_pylist()
    if outside := set(labels) - set(range(file.classes)):
        raise damaged(where, "labels", outside.pop(), f"between 0 and {file.classes - 1}")
    return table["img.bytes"].to_pylist(), labels


def decode_images(encoded: Sequence[bytes], size: tuple[int, int], *, where: str) -> torch.Tensor:
    """Decode PNG or JPEG images of one size.

    Args:
        encoded: Bytes of each image; at least one image.
        size: Height and width of every image, in pixels.
        where: Path or address, for messages.

    Shape:
        ``(len(encoded), 3, *size)``, uint8.

    Raises:
        ImportError: If pillow is not installed.
        ValueError: If an image cannot be decoded, has another size, or is not RGB.

    Example:
        >>> from PIL import Image
        >>> file = io.BytesIO()
        >>> Image.new("RGB", (5, 7)).save(file, format="PNG")
        >>> decode_images([file.getvalue()], (7, 5), where="memory").shape
        torch.Size([1, 3, 7, 5])
    """
    try:
        from PIL import Image
    except ImportError as error:
        raise missing_extra("pillow", "data") from error
    broken = (OSError, SyntaxError, ValueError, Image.DecompressionBombError)  # what pillow raises
    pixels = bytearray()
    for row, contents in enumerate(encoded):
        try:
            with Image.open(io.BytesIO(contents), formats=("PNG", "JPEG")) as image:
                # Before decoding: a damaged header may claim gigabytes.
                if (image.mode, image.height, image.width) != ("RGB", *size):
                    raise ValueError(f"{image.mode} of {image.height} x {image.width}")
                pixels += image.tobytes()
        except broken as error:
            raise damaged(
                where, f"image of row {row}", error, f"a PNG or JPEG, RGB of {size[0]} x {size[1]}"
            ) from error
    return torch.frombuffer(pixels, dtype=torch.uint8).view(-1, *size, 3).permute(0, 3, 1, 2).contiguous()
