"""Data sets for experiments as in-memory tensors, and minibatches that resume exactly."""

import os
from typing import Any

from dynarank.data.batches import Batches
from dynarank.data.cifar10 import crop_and_flip, load_cifar10
from dynarank.data.digits import load_digits_data
from dynarank.data.etth1 import HourlySeries, load_etth1
from dynarank.data.mnist import load_mnist
from dynarank.data.splits import DataSplits
from dynarank.data.synthetic import PlantedTeacher, planted_teacher
from dynarank.data.text import CharacterText, all_blocks, random_blocks
from dynarank.data.tiny_shakespeare import load_tiny_shakespeare
from dynarank.errors import unknown_name

__all__ = [
    "Batches",
    "CharacterText",
    "DataSplits",
    "HourlySeries",
    "PlantedTeacher",
    "all_blocks",
    "crop_and_flip",
    "load",
    "load_cifar10",
    "load_digits_data",
    "load_etth1",
    "load_mnist",
    "load_tiny_shakespeare",
    "planted_teacher",
    "random_blocks",
]

NAMES = ("digits", "mnist", "synthetic")


def load(name: str, *, directory: str | os.PathLike[str] | None = None, **options: Any) -> DataSplits:
    """Load a data set by name.

    Args:
        name: ``"mnist"``, ``"digits"`` or ``"synthetic"``.
        directory: Folder with the files of ``"mnist"``; the two others read no files and do not look at it.
        **options: Passed on to `load_mnist`, `load_digits_data` or `planted_teacher`; the latter's ``rank`` is 4 here
            unless given.

    Raises:
        ValueError: If the name is unknown, or as the loader says.

    Example:
        >>> load("synthetic", rank=2, inputs=7, outputs=5, samples=40)
        DataSplits(synthetic: train (40, 7), validation (10, 7), test (10, 7), classes None)
    """
    if name == "mnist":
        return load_mnist(directory, **options)
    if name == "digits":
        return load_digits_data(**options)
    if name == "synthetic":
        return planted_teacher(**{"rank": 4, **options}).splits
    raise unknown_name("data set", name, NAMES)
