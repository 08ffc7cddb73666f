"""Laws of load_etth1 and its windows on a small file, and one test on the real one."""

import hashlib
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from dynarank.data.etth1 import CsvSource, HourlySeries, load_etth1

ROWS = (11, 5, 4)
TABLE = torch.randn(23, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64).mul(7).add(2).tolist()
LINES = ["date,HUFL,HULL,OT", *(f"2016-07-01 {hour}:00," + ",".join(map(repr, row)) for hour, row in enumerate(TABLE))]
TEXT = "\n".join([*LINES, ""])


def load_small(directory: Path | None = None, *mirrors: str, **options) -> HourlySeries:
    source = CsvSource(hashlib.sha256(TEXT.encode()).hexdigest(), ROWS, mirrors=mirrors)
    return load_etth1(directory, **options, _source=source)


def write(folder: Path, text: str = TEXT) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "ETTh1.csv"
    path.write_bytes(text.encode())
    return path


def test_every_series_is_standardised_by_its_training_part(tmp_path: Path):
    write(tmp_path)
    series = load_small(tmp_path)
    table = torch.tensor(TABLE, dtype=torch.float64)
    for column, name in enumerate(("HUFL", "HULL", "OT")):
        known = table[:11, column]
        mean = known.sum() / 11
        deviation = ((known - mean).square().sum() / 11).sqrt()
        expected = (table[:20, column] - mean) / deviation
        torch.testing.assert_close(series.values[:, column].double(), expected, atol=1e-6, rtol=0)
        assert series.names[column] == name
    assert series.values.dtype == torch.float32 and len(series.names) == 3


@pytest.mark.parametrize(("part", "begin", "end"), [("train", 0, 11), ("validation", 11, 16), ("test", 16, 20)])
@pytest.mark.parametrize(("lookback", "horizon"), [(1, 1), (3, 2), (5, 4)])
def test_windows_are_every_stretch_within_the_part(part: str, begin: int, end: int, lookback: int, horizon: int):
    values = torch.arange(40.0).view(20, 2)
    inputs, targets = HourlySeries(("a", "b"), values, ROWS).windows(part, lookback=lookback, horizon=horizon)
    firsts = range(max(begin, lookback), end - horizon + 1)  # hours that are forecast first
    assert len(inputs) == len(targets) == len(firsts) > 0
    for known, wanted, first in zip(inputs, targets, firsts, strict=True):
        assert torch.equal(known, values[first - lookback : first].mT)
        assert torch.equal(wanted, values[first : first + horizon].mT)


def test_windows_are_views():
    series = HourlySeries(("a",), torch.zeros(20, 1), ROWS)
    inputs, targets = series.windows("train", lookback=3, horizon=2)
    assert {part.untyped_storage().data_ptr() for part in (inputs, targets)} == {
        series.values.untyped_storage().data_ptr()
    }


@pytest.mark.parametrize(
    ("part", "lookback", "horizon"),
    [("train", 0, 1), ("train", 3, 0), ("train", 3, 9), ("validation", 3, 6), ("validation", 14, 3), ("test", 20, 1)],
)
def test_windows_that_do_not_fit_are_refused(part: str, lookback: int, horizon: int):
    series = HourlySeries(("a",), torch.zeros(20, 1), ROWS)
    with pytest.raises(ValueError, match=f"of the {part} part and .*, got {lookback} and {horizon}"):
        series.windows(part, lookback=lookback, horizon=horizon)


def test_the_longest_windows_fit():
    series = HourlySeries(("a",), torch.zeros(20, 1), ROWS)
    sizes = {"train": (3, 8), "validation": (13, 3), "test": (16, 4)}
    for part, (lookback, horizon) in sizes.items():
        assert len(series.windows(part, lookback=lookback, horizon=horizon)[0]) == 1


def test_an_unknown_part_is_refused():
    with pytest.raises(ValueError, match="part must be one of train, validation, test, got 'training'"):
        HourlySeries(("a",), torch.zeros(20, 1), ROWS).windows("training", lookback=1, horizon=1)


@pytest.mark.parametrize("subfolder", ["", "etth1", "ett", "ETT-small"])
def test_the_file_is_found_in_directory_and_environment(
    subfolder: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    write(tmp_path / subfolder)
    expected = load_small(tmp_path).values
    monkeypatch.setenv("DYNARANK_DATA_DIR", str(tmp_path))
    assert torch.equal(load_small(download=False).values, expected)


def test_a_missing_file_is_named_with_the_folders(tmp_path: Path):
    with pytest.raises(ValueError, match=r"has no ETTh1.csv, .* subfolder etth1 or ett or ETT-small"):
        load_small(tmp_path)


def test_a_changed_file_is_refused(tmp_path: Path):
    path = write(tmp_path, TEXT.replace("OT", "TO"))
    with pytest.raises(ValueError, match=r"SHA-256 of the contents must be .* delete it and load again") as caught:
        load_small(tmp_path)
    assert str(caught.value).startswith(f"{path}: ")


def test_a_download_fills_the_cache_once(tmp_path: Path, cache: Path):
    bad, good = write(tmp_path / "bad", "<html>").as_uri(), write(tmp_path / "good").as_uri()
    expected = load_small(None, bad, good).values
    assert [path.name for path in (cache / "etth1").iterdir()] == ["ETTh1.csv"]
    assert torch.equal(load_small(download=False).values, expected)


@pytest.mark.parametrize("download", [True, False])
def test_without_file_and_network_one_error_names_both_remedies(download: bool, cache: Path, tmp_path: Path):
    with pytest.raises(RuntimeError, match="DYNARANK_DATA_DIR, or run once with a network") as caught:
        load_small(None, (tmp_path / "absent").as_uri(), download=download)
    assert str(cache / "etth1") in str(caught.value)


def test_the_real_file_passes_every_check(find_real: Callable[[str, str], Path]):
    series = load_etth1(find_real("ett", "ETTh1.csv"))
    assert repr(series) == (
        "HourlySeries(HUFL, HULL, MUFL, MULL, LUFL, LULL, OT: train 8640, validation 2880, test 2880 hours)"
    )
    train = series.values[:8640].double()
    torch.testing.assert_close(train.mean(0), torch.zeros(7, dtype=torch.float64), atol=1e-6, rtol=0)
    torch.testing.assert_close(train.std(0, correction=0), torch.ones(7, dtype=torch.float64), atol=1e-6, rtol=0)
    sizes = [len(series.windows(part, lookback=336, horizon=96)[0]) for part in ("train", "validation", "test")]
    assert sizes == [8209, 2785, 2785]
