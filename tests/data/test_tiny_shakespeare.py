"""Laws of load_tiny_shakespeare on a small text, and one test on the real one."""

import hashlib
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from dynarank.data.text import CharacterText
from dynarank.data.tiny_shakespeare import TextSource, load_tiny_shakespeare

TEXT = "Now is the winter of our discontent\nMade glorious summer by this sun of York;\n"


def make_source(*mirrors: str) -> TextSource:
    return TextSource(hashlib.sha256(TEXT.encode()).hexdigest(), mirrors=mirrors)


def load_small(directory: Path | None = None, *mirrors: str, **options) -> CharacterText:
    return load_tiny_shakespeare(directory, **options, _source=make_source(*mirrors))


def write(folder: Path, text: str = TEXT) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "input.txt"
    path.write_bytes(text.encode())
    return path


def read(text: CharacterText) -> str:
    return text.decode(torch.cat([text.train, text.validation, text.test]))


@pytest.mark.parametrize("subfolder", ["", "tinyshakespeare", "tiny_shakespeare"])
def test_the_text_is_found_in_directory_and_environment(
    subfolder: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    write(tmp_path / subfolder)
    assert read(load_small(tmp_path)) == TEXT
    monkeypatch.setenv("DYNARANK_DATA_DIR", str(tmp_path))
    assert read(load_small(download=False)) == TEXT


def test_a_missing_file_is_named_with_the_folders(tmp_path: Path):
    with pytest.raises(ValueError, match=r"has no input.txt, .* subfolder tinyshakespeare or tiny_shakespeare"):
        load_small(tmp_path)


def test_a_changed_text_is_refused(tmp_path: Path):
    path = write(tmp_path, TEXT.replace("sun", "son"))
    with pytest.raises(ValueError, match=r"SHA-256 of the contents must be .* delete it and load again") as caught:
        load_small(tmp_path)
    assert str(caught.value).startswith(f"{path}: ")


def test_a_download_fills_the_cache_once(tmp_path: Path, cache: Path):
    bad, good = write(tmp_path / "bad", "<html>").as_uri(), write(tmp_path / "good").as_uri()
    assert read(load_small(None, bad, good)) == TEXT
    assert [path.name for path in (cache / "tiny_shakespeare").iterdir()] == ["input.txt"]
    assert read(load_small(download=False)) == TEXT


@pytest.mark.parametrize("download", [True, False])
def test_without_file_and_network_one_error_names_both_remedies(download: bool, cache: Path, tmp_path: Path):
    with pytest.raises(RuntimeError, match="DYNARANK_DATA_DIR, or run once with a network") as caught:
        load_small(None, (tmp_path / "absent").as_uri(), download=download)
    assert str(cache / "tiny_shakespeare") in str(caught.value)


def test_the_real_text_passes_every_check(find_real: Callable[[str, str], Path]):
    text = load_tiny_shakespeare(find_real("tinyshakespeare", "input.txt"))
    assert len(text.characters) == 65
    assert [len(part) for part in (text.train, text.validation, text.test)] == [1_003_854, 55_770, 55_770]
    assert text.decode(text.train[:14]) == "First Citizen:"
