"""CIFAR-10 from parquet files in a folder, the user's cache or the public hub, and its usual augmentation."""

import os
from dataclasses import dataclass
from pathlib import Path
from typing import final

import torch

from dynarank.data.download import download as download_file
from dynarank.data.files import locate
from dynarank.data.images import ImageFile, parse_rows, read_images
from dynarank.data.splits import DataSplits

# Of each channel over the 50,000 training images, pixels in [0, 1].
MEAN, STANDARD_DEVIATION = (0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616)


@final
@dataclass(frozen=True)
class ParquetSource:
    """The files of the training and the test images, and the folders on the web that hold them."""

    train: ImageFile
    test: ImageFile
    mirrors: tuple[str, ...]

    @property
    def files(self) -> tuple[ImageFile, ImageFile]:
        """The two files in the order of the fields."""
        return self.train, self.test


CIFAR10 = ParquetSource(
    train=ImageFile("train.parquet", rows=50_000, size=(32, 32), classes=10),
    test=ImageFile("test.parquet", rows=10_000, size=(32, 32), classes=10),
    mirrors=("https://huggingface.co/datasets/uoft-cs/cifar10/resolve/main/plain_text",),
)


def load_cifar10(
    directory: str | os.PathLike[str] | None = None,
    *,
    download: bool = True,
    validation: int = 5_000,
    split_seed: int = 1234,
    _source: ParquetSource = CIFAR10,
) -> DataSplits:
    """Load CIFAR-10: 32 x 32 colour images normalised per channel as ``(pixel / 255 - mean) / standard deviation``.

    The files ``train.parquet`` and ``test.parquet`` are looked for in this order, each time in the folder itself and in
    its subfolder ``cifar10``: ``directory``, and nowhere else when it is given; the folder that the environment
    variable ``DYNARANK_DATA_DIR`` names; the user's cache, ``$XDG_CACHE_HOME/dynarank/cifar10`` or
    ``~/.cache/dynarank/cifar10``. Otherwise they are downloaded into the cache. Every file is checked by columns,
    number of rows, labels and image sizes in every load, but not by SHA-256: the images may be PNG, as published, or
    JPEG, which loses a little. Decoding takes about ten seconds.

    Args:
        directory: Folder with the files, or None to search.
        download: Whether the public hub may be asked when no folder has the files.
        validation: How many of the 50,000 training images become the validation part.
        split_seed: Seed of the permutation that chooses them. The global generator is neither used nor changed.

    Shape:
        - inputs: ``(50,000 - validation, 3, 32, 32)``, ``(validation, 3, 32, 32)``, ``(10,000, 3, 32, 32)``, float32.
        - targets: ``(N,)``, int64.

    Raises:
        ImportError: If pyarrow or pillow is not installed.
        ValueError: If ``validation`` is out of range, ``directory`` lacks a file, or a file is damaged.
        RuntimeError: If no folder has the files and they cannot be downloaded.

    Example:
        >>> load_cifar10("no-such-folder")
        Traceback (most recent call last):
        ValueError: load_cifar10: directory 'no-such-folder' has no train.parquet, test.parquet, ...

    Reference:
        A. Krizhevsky, Learning multiple layers of features from tiny images, technical report, University of Toronto,
        2009, https://www.cs.toronto.edu/~kriz/cifar.html. We hold out a validation part; the data set has none.
    """
    samples = _source.train.rows
    if not 0 <= validation < samples:
        raise ValueError(f"load_cifar10: validation must be between 0 and {samples - 1}, got {validation}.")
    folder = locate(
        "cifar10",
        directory,
        missing=lambda folder: ", ".join(file.name for file in _missing(folder, _source)),
        fetch=(lambda cache: _download(cache, _source)) if download else None,
    )
    (train_images, train_targets), (test_images, test_targets) = (
        read_images(folder / file.name, file) for file in _source.files
    )
    train_inputs, test_inputs = _normalise(train_images), _normalise(test_images)
    order = torch.randperm(samples, generator=torch.Generator().manual_seed(split_seed))
    train, held_out = order[: samples - validation], order[samples - validation :]
    return DataSplits(
        "cifar10",
        train_inputs[train],
        train_targets[train],
        train_inputs[held_out],
        train_targets[held_out],
        test_inputs,
        test_targets,
        classes=_source.train.classes,
    )


def crop_and_flip(images: torch.Tensor, *, padding: int = 4, generator: torch.Generator) -> torch.Tensor:
    """Crop every image at random out of itself padded with zeros, and mirror it left to right with probability 1/2.

    The draws of different images are independent; all channels of an image share them. The crop has the size of the
    image. In normalised images the padding has the mean colour; it is not black.

    Args:
        images: A batch; not changed.
        padding: Zeros on each of the four sides, in pixels, and so the largest shift of the contents.
        generator: Source of all draws; its state alone decides them.

    Shape:
        ``(N, C, H, W)`` in and out.

    Raises:
        ValueError: If the images are not a batch, or ``padding`` is negative.

    Example:
        >>> images = torch.arange(12.0).reshape(1, 1, 3, 4)
        >>> crop_and_flip(images, padding=1, generator=torch.Generator().manual_seed(0)).shape
        torch.Size([1, 1, 3, 4])

    Reference:
        K. He, X. Zhang, S. Ren, J. Sun, Deep residual learning for image recognition, CVPR 2016,
        https://arxiv.org/abs/1512.03385, section 4.2.
    """
    if images.ndim != 4 or padding < 0:
        got = f"{tuple(images.shape)} and {padding}"
        raise ValueError(f"crop_and_flip: images must be (N, C, H, W) and padding at least 0, got {got}.")
    samples, channels, height, width = images.shape
    device = images.device
    corners = torch.randint(2 * padding + 1, (2, samples, 1), generator=generator, device=generator.device)
    mirrored = torch.randint(2, (samples, 1), generator=generator, device=generator.device).to(device) == 1  # (N, 1)
    top, left = corners.to(device)  # (N, 1) each
    rows = top + torch.arange(height, device=device)  # (N, H)
    columns = torch.arange(width, device=device)  # (W,)
    columns = left + torch.where(mirrored, columns.flip(0), columns)  # (N, W)
    image = torch.arange(samples, device=device)[:, None, None, None]  # (N, 1, 1, 1)
    channel = torch.arange(channels, device=device)[:, None, None]  # (C, 1, 1)
    padded = torch.nn.functional.pad(images, [padding] * 4)  # (N, C, H + 2 padding, W + 2 padding)
    return padded[image, channel, rows[:, None, :, None], columns[:, None, None, :]]


def _normalise(images: torch.Tensor) -> torch.Tensor:
    mean, deviation = (torch.tensor(values).view(3, 1, 1) for values in (MEAN, STANDARD_DEVIATION))
    return images.float().div_(255).sub_(mean).div_(deviation)  # (N, 3, 32, 32)


def _missing(folder: Path, source: ParquetSource) -> list[ImageFile]:
    return [file for file in source.files if not (folder / file.name).is_file()]


def _download(cache: Path, source: ParquetSource) -> None:
    for file in _missing(cache, source):
        # The hub numbers the pieces of a split; here each split is one piece.
        name = file.name.replace(".parquet", "-00000-of-00001.parquet")
        download_file(
            [f"{mirror}/{name}" for mirror in source.mirrors],
            cache / file.name,
            check=lambda contents, url, file=file: parse_rows(contents, file, where=url),
        )
