"""MNIST from a folder, the user's cache or a public mirror, without torchvision."""

import os
from dataclasses import dataclass
from pathlib import Path
from typing import final

import torch

from dynarank.data.download import download as download_file
from dynarank.data.files import locate
from dynarank.data.idx import IdxFile, parse_idx, read_idx
from dynarank.data.splits import DataSplits

MEAN, STANDARD_DEVIATION = 0.1307, 0.3081  # of the 60,000 training images, pixels in [0, 1]


@final
@dataclass(frozen=True)
class IdxSource:
    """Four IDX files (training images and labels, test images and labels) and the folders on the web that hold them."""

    train_images: IdxFile
    train_labels: IdxFile
    test_images: IdxFile
    test_labels: IdxFile
    mirrors: tuple[str, ...]

    @property
    def files(self) -> tuple[IdxFile, IdxFile, IdxFile, IdxFile]:
        """The four files in the order of the fields."""
        return self.train_images, self.train_labels, self.test_images, self.test_labels


MNIST = IdxSource(
    train_images=IdxFile(
        "train-images-idx3-ubyte",
        shape=(60_000, 28, 28),
        sha256="ba891046e6505d7aadcbbe25680a0738ad16aec93bde7f9b65e87a2fc25776db",
    ),
    train_labels=IdxFile(
        "train-labels-idx1-ubyte",
        shape=(60_000,),
        sha256="65a50cbbf4e906d70832878ad85ccda5333a97f0f4c3dd2ef09a8a9eef7101c5",
    ),
    test_images=IdxFile(
        "t10k-images-idx3-ubyte",
        shape=(10_000, 28, 28),
        sha256="0fa7898d509279e482958e8ce81c8e77db3f2f8254e26661ceb7762c4d494ce7",
    ),
    test_labels=IdxFile(
        "t10k-labels-idx1-ubyte",
        shape=(10_000,),
        sha256="ff7bcfd416de33731a308c3f266cc351222c34898ecbeaf847f06e48f7ec33f2",
    ),
    mirrors=(
        "https://ossci-datasets.s3.amazonaws.com/mnist",
        "https://storage.googleapis.com/cvdf-datasets/mnist",
    ),
)


def load_mnist(
    directory: str | os.PathLike[str] | None = None,
    *,
    download: bool = True,
    validation: int = 10_000,
    split_seed: int = 1234,
    _source: IdxSource = MNIST,
) -> DataSplits:
    """Load MNIST: 28 x 28 images normalised as ``(pixel / 255 - 0.1307) / 0.3081``.

    The four IDX files, compressed or plain, are looked for in this order, each time in the folder itself and in its
    subfolder ``mnist``: ``directory``, and nowhere else when it is given; the folder that the environment variable
    ``DYNARANK_DATA_DIR`` names; the user's cache, ``$XDG_CACHE_HOME/dynarank/mnist`` or ``~/.cache/dynarank/mnist``.
    Otherwise they are downloaded into the cache. Every file is checked by type, sizes and SHA-256 in every load.

    Args:
        directory: Folder with the files, or None to search.
        download: Whether a public mirror may be asked when no folder has the files.
        validation: How many of the 60,000 training images become the validation part.
        split_seed: Seed of the permutation that chooses them. The global generator is neither used nor changed.

    Shape:
        - inputs: ``(60,000 - validation, 1, 28, 28)``, ``(validation, 1, 28, 28)``, ``(10,000, 1, 28, 28)``, float32.
        - targets: ``(N,)``, int64.

    Raises:
        ValueError: If ``validation`` is out of range, ``directory`` lacks a file, or a file is damaged.
        RuntimeError: If no folder has the files and they cannot be downloaded.

    Example:
        >>> load_mnist("no-such-folder")
        Traceback (most recent call last):
        ValueError: load_mnist: directory 'no-such-folder' has no train-images-idx3-ubyte, ...

    Reference:
        Y. LeCun, L. Bottou, Y. Bengio, P. Haffner, Gradient-based learning applied to document recognition, Proceedings
        of the IEEE 86(11), 1998, https://doi.org/10.1109/5.726791. We hold out a validation part; they did not.
    """
    samples = _source.train_images.shape[0]
    if not 0 <= validation < samples:
        raise ValueError(f"load_mnist: validation must be between 0 and {samples - 1}, got {validation}.")
    folder = locate(
        "mnist",
        directory,
        missing=lambda folder: _describe_missing(folder, _source),
        fetch=(lambda cache: _download(cache, _source)) if download else None,
    )
    tensors = [read_idx(file.find(folder) or folder / file.name, file) for file in _source.files]
    train_inputs, test_inputs = _normalise(tensors[0]), _normalise(tensors[2])
    train_targets, test_targets = tensors[1].long(), tensors[3].long()
    order = torch.randperm(samples, generator=torch.Generator().manual_seed(split_seed))
    train, held_out = order[: samples - validation], order[samples - validation :]
    return DataSplits(
        "mnist",
        train_inputs[train],
        train_targets[train],
        train_inputs[held_out],
        train_targets[held_out],
        test_inputs,
        test_targets,
        classes=10,
    )


def _normalise(images: torch.Tensor) -> torch.Tensor:
    pixels = images.unsqueeze(1).float() / 255  # (N, 1, 28, 28)
    return pixels.sub_(MEAN).div_(STANDARD_DEVIATION)


def _missing(folder: Path, source: IdxSource) -> list[IdxFile]:
    return [file for file in source.files if file.find(folder) is None]


def _describe_missing(folder: Path, source: IdxSource) -> str:
    names = ", ".join(file.name for file in _missing(folder, source))
    return names and f"{names} (plain or .gz)"


def _download(cache: Path, source: IdxSource) -> None:
    for file in _missing(cache, source):
        download_file(
            [f"{mirror}/{file.name}.gz" for mirror in source.mirrors],
            cache / f"{file.name}.gz",
            check=lambda contents, url, file=file: parse_idx(contents, file, where=url),
        )
