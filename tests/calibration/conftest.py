"""Costs that are made by hand, so that no decision in a test depends on a clock."""

from pathlib import Path

import pytest

from dynarank.calibration import MeasuredCosts
from dynarank.cost_model.work import OPERATORS, PURPOSES

CALL, MULTIPLICATION, NUMBER = 5e-5, 3e-11, 1e-9


@pytest.fixture
def costs() -> MeasuredCosts:
    """A machine on which every operator takes the same times, in training thrice those of inference."""
    times = (CALL, MULTIPLICATION, NUMBER, NUMBER, NUMBER)
    training = tuple(3 * time for time in times)
    return MeasuredCosts(
        {
            purpose: dict.fromkeys(OPERATORS, training if purpose == "training" else times)  # type: ignore[arg-type]
            for purpose in PURPOSES
        }
    )


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty folder in place of the user's cache."""
    monkeypatch.setenv("DYNARANK_CACHE_DIR", str(tmp_path / "cache"))
    return tmp_path / "cache"
