"""Laws of the download: only whole, checked files appear, from the first mirror that has one."""

from pathlib import Path

import pytest

from dynarank.data.download import download


def check(contents: bytes, url: str) -> None:
    if contents != b"good":
        raise ValueError(f"{url}: wrong contents")


def mirror(folder: Path, name: str, contents: bytes) -> str:
    path = folder / name
    path.write_bytes(contents)
    return path.as_uri()


def test_bad_mirrors_are_passed_over(tmp_path: Path):
    absent = (tmp_path / "absent").as_uri()
    urls = [absent, mirror(tmp_path, "bad", b"bad"), mirror(tmp_path, "good", b"good")]
    target = tmp_path / "new" / "folder" / "file"
    download(urls, target, check=check)
    assert target.read_bytes() == b"good"
    assert list(target.parent.iterdir()) == [target]


def test_failure_names_every_mirror_and_leaves_nothing(tmp_path: Path):
    urls = [(tmp_path / "absent").as_uri(), mirror(tmp_path, "bad", b"bad")]
    target = tmp_path / "cache" / "file"
    with pytest.raises(RuntimeError, match=r"no mirror delivered file: .*absent: .*; .*bad: wrong contents"):
        download(urls, target, check=check)
    assert not target.parent.exists()


def test_a_failed_write_leaves_no_temporary_file(tmp_path: Path):
    target = tmp_path / "cache" / "file"
    target.mkdir(parents=True)  # a folder stands where the file should go
    with pytest.raises(OSError, match="file"):
        download([mirror(tmp_path, "good", b"good")], target, check=check)
    assert list(target.parent.iterdir()) == [target]
