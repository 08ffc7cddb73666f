"""What the tests of all loaders share: empty surroundings, and the real files where there are some."""

import os
from collections.abc import Callable
from pathlib import Path

import pytest

REAL = (os.environ.get("DYNARANK_DATA_DIR"), Path(__file__).resolve().parents[2].parent / "shared" / "data")


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty cache, and no data folder in the environment; returns the cache of all data sets."""
    monkeypatch.delenv("DYNARANK_DATA_DIR", raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache" / "dynarank"


@pytest.fixture
def find_real() -> Callable[[str, str], Path]:
    """A function from the name of a subfolder and a file pattern to the folder with the real files; skips without."""

    def find(subfolder: str, pattern: str) -> Path:
        folders = [Path(root) / sub for root in REAL if root is not None for sub in ("", subfolder)]
        folder = next((folder for folder in folders if any(folder.glob(pattern))), None)
        return folder or pytest.skip(f"{pattern} is in no folder; set DYNARANK_DATA_DIR")

    return find
