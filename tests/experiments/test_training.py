"""A run from start to end: its outcome, its files, and what it leaves alone."""

from pathlib import Path

import pytest
import torch

from conftest_types import MakeConfig
