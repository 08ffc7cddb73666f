"""Settings for every test and every doctest: one thread, a fixed seed, reproducible hypothesis examples."""

import os

# Before torch is imported, so that processes started by a test inherit it.
os.environ["OMP_NUM_THREADS"] = "1"

import pytest
import torch
from hypothesis import settings

torch.set_num_threads(1)
settings.register_profile("dynarank", deadline=None, derandomize=True, database=None)
settings.load_profile("dynarank")


@pytest.fixture(autouse=True)
def seed() -> None:
    torch.manual_seed(0)
