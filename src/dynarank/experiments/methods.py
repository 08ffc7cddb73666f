"""Methods from their names and ``key=value`` options, read against the fields of their dataclass."""

import dataclasses
import types
import typing
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

from dynarank._discovery import discover
from dynarank.errors import unknown_name
from dynarank.experiments.config import TrainConfig
from dynarank.experiments.defaults import DEFAULTS
from dynarank.integrators.base import AbstractIntegrator
from dynarank.ranks.base import AbstractRankPolicy

Method = TypeVar("Method")

DENSE_START = 4.0  # the budget at the beginning, as a multiple of the budget, where the network starts dense
_TRUTH = {"true": True, "yes": True, "1": True, "false": False, "no": False, "0": False}


@dataclass(frozen=True)
class Kind:
    """A kind of method.

    Args:
        name: What it is called in messages.
        package: Folder that holds its methods.
        base: Class that they derive from.
        flag: Where options are given.
    """

    name: str
    package: str
    base: type
    flag: str


INTEGRATOR = Kind("integrator", "dynarank.integrators", AbstractIntegrator, "integrator_options")
RANK_POLICY = Kind("rank policy", "dynarank.ranks", AbstractRankPolicy, "rank_options")


def integrator(config: TrainConfig) -> AbstractIntegrator:
    """Return the integrator of a configuration.

    Raises:
        ValueError: If the name or an option is unknown, or an option has no such value.
    """
    return build(INTEGRATOR, config.integrator, config.integrator_options)


def rank_policy(config: TrainConfig, *, freeze_step: int) -> AbstractRankPolicy:
    """Return the rank policy of a complete configuration.

    A policy with the fields ``start`` and ``steps``, as the budget has, gets a budget that falls until ranks freeze.

    Args:
        config: The configuration, completed.
        freeze_step: Step of the last rank event, as the optimizer counts.

    Raises:
        ValueError: As `integrator`, or if the policy knows no budget or tolerance.
    """
    name = config.rank_policy or ""
    cls = _find(RANK_POLICY, name)
    given = {"fraction": ("budget", config.budget), "tolerance": ("tolerance", config.tolerance)}
    presets: dict[str, Any] = {}
    for option, (flag, value) in given.items():
        if value is not None and option not in _options(cls):
            raise ValueError(f"rank policy {name!r} takes no {flag}, got {value}. {_allowed(cls)}")
        if value is not None:
            presets[option] = value
    times = DENSE_START if config.start == "dense" else DEFAULTS[config.data].budget_start
    if config.budget is not None and times > 1 and {"fraction", "start", "steps"} <= _options(cls).keys():
        presets |= {"start": min(1.0, times * config.budget), "steps": freeze_step}
    return build(RANK_POLICY, name, config.rank_options, presets)


def build(kind: Kind, name: str, options: Sequence[str], presets: Mapping[str, Any] | None = None) -> Any:
    """Return the method of that name, built with the options.

    Args:
        kind: Kind of method.
        name: Name of its file.
        options: ``key=value``, read by the type of the field called ``key``.
        presets: Values by field, which options override.

    Raises:
        ValueError: If the name or an option is unknown, an option has no such value, or a needed one is missing.

    Example:
        >>> build(RANK_POLICY, "relative_tail", ["tolerance=0.2"])
        RelativeTail(tolerance=0.2, growth=1.0, min_rank=1)
        >>> build(RANK_POLICY, "relative_tail", ["tolerence=0.2"])
        Traceback (most recent call last):
        ValueError: rank policy 'relative_tail' has no option 'tolerence'. Its options: tolerance, growth, min_rank.
    """
    cls = _find(kind, name)
    fields = _options(cls)
    values = dict(presets or {})
    for option in options:
        key, equals, text = option.partition("=")
        if not equals:
            raise ValueError(f"{kind.flag} must be given as key=value, got {option!r}.")
        if key not in fields:
            raise ValueError(f"{kind.name} {name!r} has no option {key!r}. {_allowed(cls)}")
        values[key] = _read(text, fields[key], where=f"option {key!r} of {kind.name} {name!r}")
    if missing := [key for key in _needed(cls) if key not in values]:
        flag = kind.flag.replace("_", "-")
        raise ValueError(f"{kind.name} {name!r} needs {', '.join(missing)}. Give it as --{flag} {missing[0]}=VALUE.")
    return cls(**values)


def _find(kind: Kind, name: str) -> type:
    methods = discover(kind.package, kind.base)
    if name not in methods:
        raise unknown_name(kind.name, name, methods)
    return methods[name]


def _options(cls: Any) -> dict[str, Any]:
    """Return the options of a method with their types."""
    if not dataclasses.is_dataclass(cls):
        return {}
    hints = typing.get_type_hints(cls)
    return {field.name: hints[field.name] for field in dataclasses.fields(cls) if field.init}


def _needed(cls: Any) -> list[str]:
    missing = dataclasses.MISSING
    fields = [field for field in dataclasses.fields(cls) if field.init] if dataclasses.is_dataclass(cls) else []
    return [field.name for field in fields if field.default is missing and field.default_factory is missing]


def _allowed(cls: type) -> str:
    return f"Its options: {', '.join(_options(cls))}." if _options(cls) else "It has no options."


def _read(text: str, kind: Any, *, where: str) -> Any:
    """Return the value that ``text`` stands for; of a union, the first member that fits."""
    members = typing.get_args(kind) if isinstance(kind, types.UnionType) or _is_union(kind) else (kind,)
    for member in members:
        found, value = _read_as(text, member)
        if found:
            return value
    names = " or ".join("none" if member is types.NoneType else _name(member) for member in members)
    raise ValueError(f"{where} must be {names}, got {text!r}.")


def _read_as(text: str, kind: Any) -> tuple[bool, Any]:
    if kind is types.NoneType:
        return text.lower() == "none", None
    if kind is bool:
        return text.lower() in _TRUTH, _TRUTH.get(text.lower())
    if typing.get_origin(kind) is typing.Literal:
        return next(((True, choice) for choice in typing.get_args(kind) if str(choice) == text), (False, None))
    if kind in (int, float):
        try:
            return True, kind(text)
        except ValueError:
            return False, None
    return kind is str, text


def _is_union(kind: Any) -> bool:
    return typing.get_origin(kind) is typing.Union


def _name(kind: Any) -> str:
    if typing.get_origin(kind) is typing.Literal:
        return " or ".join(map(str, typing.get_args(kind)))
    words = {int: "a whole number", float: "a number", bool: "true or false", str: "text"}
    return words.get(kind, getattr(kind, "__name__", str(kind)))
