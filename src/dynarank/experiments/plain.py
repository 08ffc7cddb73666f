"""Outcomes as plain data."""

import math
from collections.abc import Mapping
from dataclasses import fields, is_dataclass
from typing import Any


def standard(value: Any) -> Any:
    """Return the value as standard JSON holds it: null for what is not finite, dicts for dataclasses, lists for tuples.

    Example:
        >>> standard({"loss": float("nan"), "ranks": (3, 5)})
        {'loss': None, 'ranks': [3, 5]}
    """
    if is_dataclass(value) and not isinstance(value, type):
        value = {field.name: getattr(value, field.name) for field in fields(value)}
    if isinstance(value, Mapping):
        return {str(name): standard(item) for name, item in value.items()}
    if isinstance(value, list | tuple):
        return [standard(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
