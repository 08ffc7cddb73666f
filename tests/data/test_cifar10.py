"""Laws of load_cifar10 on small files of the same format, and one test on the real ones."""

import io
from collections.abc import Callable
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest
import torch
from PIL import Image

from dynarank.data.cifar10 import ParquetSource, load_cifar10
from dynarank.data.images import ImageFile
from dynarank.data.splits import DataSplits

TRAIN, TEST = 20, 6
MEAN, DEVIATION = torch.tensor([0.4914, 0.4822, 0.4465]), torch.tensor([0.2470, 0.2435, 0.2616])


def draw(rows: int) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(rows)
    images = torch.randint(256, (rows, 3, 32, 32), generator=generator, dtype=torch.uint8)
    return images, torch.randint(10, (rows,), generator=generator)


IMAGES, LABELS = draw(TRAIN)
TEST_IMAGES, TEST_LABELS = draw(TEST)


def make_source(*mirrors: str) -> ParquetSource:
    files = [
        ImageFile(name, rows=rows, size=(32, 32), classes=10)
        for name, rows in (("train.parquet", TRAIN), ("test.parquet", TEST))
    ]
    return ParquetSource(*files, mirrors=mirrors)


SOURCE = make_source()


def encode(image: torch.Tensor) -> bytes:
    file = io.BytesIO()
    Image.frombytes("RGB", (32, 32), bytes(image.permute(1, 2, 0).flatten().tolist())).save(file, format="PNG")
    return file.getvalue()


def write(path: Path, images: torch.Tensor, labels: torch.Tensor) -> None:
    cells = [{"bytes": encode(image), "path": "some.png"} for image in images]
    pyarrow.parquet.write_table(pyarrow.table({"img": cells, "label": labels.tolist()}), path)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    folder = tmp_path / "files"
    folder.mkdir()
    write(folder / "train.parquet", IMAGES, LABELS)
    write(folder / "test.parquet", TEST_IMAGES, TEST_LABELS)
    return folder


def load_small(directory: Path | None = None, source: ParquetSource = SOURCE, **options) -> DataSplits:
    return load_cifar10(directory, **{"validation": 5, **options}, _source=source)


def normalise(images: torch.Tensor) -> torch.Tensor:
    return ((images.movedim(1, 3).double() / 255 - MEAN) / DEVIATION).movedim(3, 1).float()


def test_images_are_normalised_and_labels_kept(folder: Path):
    splits = load_small(folder)
    assert (splits.name, splits.classes, splits.input_shape) == ("cifar10", 10, (3, 32, 32))
    torch.testing.assert_close(splits.test_inputs, normalise(TEST_IMAGES), atol=1e-5, rtol=0)
    assert torch.equal(splits.test_targets, TEST_LABELS)
    assert splits.train_inputs.is_contiguous()


@pytest.mark.parametrize("validation", [0, 5, TRAIN - 1])
def test_training_and_validation_are_a_partition(validation: int, folder: Path):
    splits = load_small(folder, validation=validation)
    assert len(splits.validation_inputs) == validation
    images = torch.cat([splits.train_inputs, splits.validation_inputs]).flatten(1)
    targets = torch.cat([splits.train_targets, splits.validation_targets])
    # Every image is found once, with its label.
    distances = torch.cdist(images, normalise(IMAGES).flatten(1))  # (loaded, written)
    source = distances.argmin(dim=1)
    assert distances.min(dim=1).values.max() < 0.1
    assert source.sort().values.tolist() == list(range(TRAIN))
    assert torch.equal(targets, LABELS[source])


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
    folder.rename(cache / "cifar10")
    assert torch.equal(load_small(download=False).train_inputs, expected)
    assert torch.equal(load_small(cache).train_inputs, expected)  # the subfolder cifar10


def test_a_given_directory_lacking_one_file_names_it(folder: Path):
    (folder / "test.parquet").unlink()
    with pytest.raises(ValueError, match=r"load_cifar10: directory .* has no test.parquet, and neither .* cifar10"):
        load_small(folder)


def test_a_damaged_file_is_named(folder: Path):
    path = folder / "test.parquet"
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(ValueError, match=r"test.parquet: contents must be a parquet file.* delete it and load again"):
        load_small(folder)


def test_a_download_fills_the_cache_once(folder: Path, cache: Path):
    for part in ("train", "test"):
        (folder / f"{part}.parquet").rename(folder / f"{part}-00000-of-00001.parquet")
    splits = load_small(source=make_source((folder.parent / "absent").as_uri(), folder.as_uri()))
    assert sorted(path.name for path in (cache / "cifar10").iterdir()) == ["test.parquet", "train.parquet"]
    assert torch.equal(load_small(download=False).train_inputs, splits.train_inputs)


def test_a_mirror_with_another_file_is_refused(folder: Path, cache: Path):
    write(folder / "train-00000-of-00001.parquet", TEST_IMAGES, TEST_LABELS)
    with pytest.raises(RuntimeError, match="number of rows must be 20, got 6"):
        load_small(source=make_source(folder.as_uri()))
    assert not cache.exists()


@pytest.mark.parametrize("validation", [-1, TRAIN])
def test_validation_must_leave_training_images(validation: int, folder: Path):
    with pytest.raises(ValueError, match=f"validation must be between 0 and 19, got {validation}"):
        load_small(folder, validation=validation)


@pytest.mark.slow
def test_the_real_files_pass_every_check(find_real: Callable[[str, str], Path]):
    splits = load_cifar10(find_real("cifar10", "train.parquet"))
    assert [tuple(splits.part(part)[0].shape) for part in ("train", "validation", "test")] == [
        (45_000, 3, 32, 32),
        (5_000, 3, 32, 32),
        (10_000, 3, 32, 32),
    ]
    everything = torch.cat([splits.train_inputs, splits.validation_inputs]).movedim(1, 3).flatten(0, 2)
    torch.testing.assert_close(everything.mean(dim=0), torch.zeros(3), atol=1e-2, rtol=0)
    torch.testing.assert_close(everything.std(dim=0), torch.ones(3), atol=2e-2, rtol=0)
    assert torch.bincount(splits.test_targets).tolist() == [1_000] * 10
