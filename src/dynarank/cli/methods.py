"""The command ``methods``: what there is to choose from."""

import dataclasses
import shutil
import textwrap
from typing import Any

from dynarank._discovery import describe, discover
from dynarank.integrators.base import AbstractIntegrator
from dynarank.layers._factored import AbstractFactoredLayer
from dynarank.ranks.base import AbstractRankPolicy
from dynarank.schedules.base import AbstractSchedule
from dynarank.switches.base import AbstractSwitch

COLUMN = 26  # where descriptions begin, after two spaces
KINDS = (
    ("Layers", "dynarank.layers", AbstractFactoredLayer),
    ("Integrators", "dynarank.integrators", AbstractIntegrator),
    ("Rank policies", "dynarank.ranks", AbstractRankPolicy),
    ("Schedules", "dynarank.schedules", AbstractSchedule),
    ("Switches", "dynarank.switches", AbstractSwitch),
)


def list_methods() -> None:
    """Print every method that discovery finds, with what it does, its options and its paper."""
    for index, (title, package, base) in enumerate(KINDS):
        print(f"{chr(10) if index else ''}{title}")
        for name, cls in discover(package, base).items():
            sentence, paper = describe(cls)
            print(_wrapped(sentence, first=f"  {name:<{COLUMN}}"))
            for label, text in (("options", _options(cls)), ("paper", paper)):
                if text:
                    print(_wrapped(f"{label}: {text}", first=" " * (COLUMN + 2)))


def _wrapped(text: str, *, first: str) -> str:
    """Return text in lines that fit, with addresses whole."""
    width = min(120, shutil.get_terminal_size((120, 0)).columns)
    indent = " " * (COLUMN + 2)
    return textwrap.fill(
        text,
        width=max(width, COLUMN + 40),
        initial_indent=first,
        subsequent_indent=indent,
        break_long_words=False,
        break_on_hyphens=False,
    )


def _options(cls: Any) -> str:
    fields = dataclasses.fields(cls) if dataclasses.is_dataclass(cls) else ()
    return ", ".join(field.name if _needed(field) else f"{field.name}={_default(field)}" for field in fields)


def _default(field: dataclasses.Field[Any]) -> Any:
    if field.default_factory is dataclasses.MISSING:
        return field.default
    return type(field.default_factory()).__name__  # another method


def _needed(field: dataclasses.Field[Any]) -> bool:
    return field.default is field.default_factory is dataclasses.MISSING
