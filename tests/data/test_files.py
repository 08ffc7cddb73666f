"""Laws of locate: the order of the places, and one error that names them all."""

from collections.abc import Callable
from pathlib import Path

import pytest

from dynarank.data.files import locate


def missing(folder: Path) -> str:
    return "" if (folder / "toy.csv").is_file() else "toy.csv"


def put(folder: Path) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "toy.csv").touch()
    return folder


def find(directory: Path | None = None, *, fetch: Callable[[Path], object] | None = None, **options) -> Path:
    return locate("toy", directory, missing=missing, fetch=fetch, **options)


def test_the_earlier_place_wins(tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch):
    named = tmp_path / "named"
    monkeypatch.setenv("DYNARANK_DATA_DIR", str(named))
    for place in (cache / "toy" / "toy", cache / "toy", named / "toy", named):
        put(place)
        assert find() == place
    assert find(put(tmp_path / "given")) == tmp_path / "given"


def test_subfolders_are_tried_in_order(tmp_path: Path):
    for name in ("b", "a"):
        put(tmp_path / name)
        assert find(tmp_path, subfolders=("a", "b")) == tmp_path / name


def test_a_given_directory_is_the_only_one_looked_at(tmp_path: Path, cache: Path):
    put(cache / "toy")
    put(tmp_path / "toy")
    with pytest.raises(ValueError, match=r"load_toy: directory '.*empty' has no toy.csv, .* its subfolder a or b"):
        find(tmp_path / "empty", fetch=put, subfolders=("a", "b"))


def test_the_last_resort_fills_the_cache_once(cache: Path):
    assert find(fetch=put) == cache / "toy"
    assert find() == cache / "toy"


def test_without_files_one_error_names_places_reason_and_remedies(
    tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
):
    def fail(folder: Path) -> None:
        raise OSError("no route")

    monkeypatch.setenv("DYNARANK_DATA_DIR", str(tmp_path / "named"))
    for fetch, reason in ((fail, "no route"), (None, "download=False")):
        with pytest.raises(
            RuntimeError, match=rf"load_toy: .* not downloaded \({reason}\).* DYNARANK_DATA_DIR"
        ) as caught:
            find(fetch=fetch)
        assert f"{tmp_path / 'named'} and {cache / 'toy'}" in str(caught.value)
