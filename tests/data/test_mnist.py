"""Laws of load_mnist on small files of the same format, and one test on the real ones."""

import gzip
import hashlib
import struct
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from dynarank.data.idx import IdxFile
from dynarank.data.mnist import IdxSource, load_mnist

TRAIN, TEST = 20, 6


def draw(*shape: int, high: int) -> torch.Tensor:
    return torch.randint(high, shape, generator=torch.Generator().manual_seed(len(shape)), dtype=torch.uint8)


TENSORS = (draw(TRAIN, 28, 28, high=256), draw(TRAIN, high=10), draw(TEST, 28, 28, high=256), draw(TEST, high=10))
NAMES = ("train-images-idx3-ubyte", "train-labels-idx1-ubyte", "t10k-images-idx3-ubyte", "t10k-labels-idx1-ubyte")


def to_idx(tensor: torch.Tensor) -> bytes:
    header = struct.pack(f">4B{tensor.ndim}I", 0, 0, 8, tensor.ndim, *tensor.shape)
    return header + bytes(tensor.flatten().tolist())


def make_source(*mirrors: str) -> IdxSource:
    files = [
        IdxFile(name, shape=tuple(tensor.shape), sha256=hashlib.sha256(to_idx(tensor)).hexdigest())
        for name, tensor in zip(NAMES, TENSORS, strict=True)
    ]
    return IdxSource(*files, mirrors=mirrors)


SOURCE = make_source()


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A folder with the small files: images compressed, labels plain."""
    folder = tmp_path / "files"
    folder.mkdir()
    for name, tensor in zip(NAMES, TENSORS, strict=True):
        contents = to_idx(tensor)
        if tensor.ndim == 3:
            (folder / f"{name}.gz").write_bytes(gzip.compress(contents, mtime=0))
        else:
            (folder / name).write_bytes(contents)
    return folder


def load_small(directory: Path | None = None, source: IdxSource = SOURCE, **options):
    return load_mnist(directory, **{"validation": 5, **options}, _source=source)


def test_images_are_normalised_and_labels_kept(folder: Path):
    splits = load_small(folder)
    assert (splits.name, splits.classes, splits.input_shape) == ("mnist", 10, (1, 28, 28))
    expected = (TENSORS[2].double() / 255 - 0.1307) / 0.3081
    torch.testing.assert_close(splits.test_inputs[:, 0].double(), expected, atol=1e-6, rtol=0)
    assert splits.test_inputs.dtype == torch.float32
    assert torch.equal(splits.test_targets, TENSORS[3].long())


@pytest.mark.parametrize("validation", [0, 5, TRAIN - 1])
def test_training_and_validation_are_a_partition(validation: int, folder: Path):
    splits = load_small(folder, validation=validation)
    assert len(splits.validation_inputs) == validation
    images = torch.cat([splits.train_inputs, splits.validation_inputs]).flatten(1)
    everything = (TENSORS[0].flatten(1).float() / 255 - 0.1307) / 0.3081
    torch.testing.assert_close(images.unique(dim=0), everything.unique(dim=0))  # sorted; all drawn images differ
    assert len(images.unique(dim=0)) == TRAIN
    targets = torch.cat([splits.train_targets, splits.validation_targets])
    assert torch.equal(targets.sort().values, TENSORS[1].long().sort().values)


def test_the_split_follows_its_seed_and_not_the_global_generator(folder: Path):
    before = torch.get_rng_state()
    first = load_small(folder)
    assert torch.equal(before, torch.get_rng_state())
    torch.manual_seed(1)
    assert torch.equal(first.validation_inputs, load_small(folder).validation_inputs)
    assert not torch.equal(first.validation_inputs, load_small(folder, split_seed=1).validation_inputs)


def test_files_are_found_in_directory_environment_and_cache(folder: Path, cache: Path, monkeypatch: pytest.MonkeyPatch):
    expected = load_small(folder).train_inputs
    monkeypatch.setenv("DYNARANK_DATA_DIR", str(folder))
    assert torch.equal(load_small(download=False).train_inputs, expected)
    monkeypatch.delenv("DYNARANK_DATA_DIR")
    cache.mkdir(parents=True)
    folder.rename(cache / "mnist")
    assert torch.equal(load_small(download=False).train_inputs, expected)
    assert torch.equal(load_small(cache).train_inputs, expected)  # the subfolder mnist


def test_a_given_directory_is_the_only_one_looked_at(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("DYNARANK_DATA_DIR", str(folder))
    with pytest.raises(ValueError, match=r"directory .*empty' has no train-images-idx3-ubyte, "):
        load_small(tmp_path / "empty")


def test_a_given_directory_lacking_one_file_names_it(folder: Path):
    (folder / NAMES[1]).unlink()
    with pytest.raises(ValueError, match=r"has no train-labels-idx1-ubyte \(plain or .gz\)"):
        load_small(folder)


def test_a_damaged_file_is_named(folder: Path):
    path = folder / NAMES[1]
    path.write_bytes(path.read_bytes()[:-1] + b"\x0b")
    with pytest.raises(ValueError, match=r"train-labels-idx1-ubyte: SHA-256 .* delete it and load again"):
        load_small(folder)


def test_a_download_fills_the_cache_once(folder: Path, cache: Path):
    for name in (NAMES[1], NAMES[3]):
        (folder / f"{name}.gz").write_bytes(gzip.compress((folder / name).read_bytes()))
    source = make_source((folder.parent / "absent").as_uri(), folder.as_uri())
    splits = load_small(source=source)
    assert sorted(path.name for path in (cache / "mnist").iterdir()) == sorted(f"{name}.gz" for name in NAMES)
    assert torch.equal(load_small(download=False).train_inputs, splits.train_inputs)


@pytest.mark.parametrize("download", [True, False])
def test_without_files_and_network_one_error_names_both_remedies(download: bool, cache: Path, tmp_path: Path):
    source = make_source((tmp_path / "absent").as_uri())
    with pytest.raises(RuntimeError, match="--data-dir or DYNARANK_DATA_DIR, or run once with a network") as caught:
        load_small(source=source, download=download)
    assert str(cache / "mnist") in str(caught.value)


@pytest.mark.parametrize("validation", [-1, TRAIN])
def test_validation_must_leave_training_images(validation: int, folder: Path):
    with pytest.raises(ValueError, match=f"validation must be between 0 and 19, got {validation}"):
        load_small(folder, validation=validation)


def test_the_real_files_pass_every_check(find_real: Callable[[str, str], Path]):
    splits = load_mnist(find_real("mnist", "train-images-idx3-ubyte*"))
    assert [tuple(splits.part(part)[0].shape) for part in ("train", "validation", "test")] == [
        (50_000, 1, 28, 28),
        (10_000, 1, 28, 28),
        (10_000, 1, 28, 28),
    ]
    everything = torch.cat([splits.train_inputs, splits.validation_inputs])
    assert abs(everything.mean()) < 1e-3
    assert abs(everything.std() - 1) < 1e-3
    assert splits.test_targets[:5].tolist() == [7, 2, 1, 0, 4]
    assert torch.bincount(splits.train_targets).min() > 4_000
