"""Trained networks with their data, to compress: one file each, found by discovery."""

from typing import Any

from dynarank._discovery import discover
from dynarank.experiments.tasks.base import AbstractTask, Quality

__all__ = ["TASKS", "AbstractTask", "Quality"]

TASKS: dict[str, Any] = discover("dynarank.experiments.tasks", AbstractTask)
