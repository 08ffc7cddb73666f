"""Tasks and contestants from the words that name them."""

from collections.abc import Iterable
from dataclasses import fields

from dynarank._discovery import describe, discover
from dynarank.errors import unknown_name
from dynarank.experiments import methods
from dynarank.experiments.contestants.base import AbstractContestant
from dynarank.experiments.contestants.low_rank import LowRank
from dynarank.experiments.python_file import class_in_file
from dynarank.experiments.tasks import TASKS, AbstractTask
from dynarank.integrators.base import AbstractIntegrator

PACKAGE = "dynarank.experiments.contestants"
METHOD = methods.Kind("method", PACKAGE, AbstractContestant, "methods")
OWN_FILE = "or a Python file of your own"


def find_task(name: str, data_dir: str | None = None) -> AbstractTask:
    """Return the task of that name, or the one that a Python file defines.

    Raises:
        ValueError: The name is unknown, or the file does not define exactly one task.
        RuntimeError: The file cannot be run.
    """
    if name.endswith(".py"):
        task: type = class_in_file(name, AbstractTask, purpose="task")
    elif name in TASKS:
        task = TASKS[name]
    else:
        raise _unknown("task", name, TASKS)
    return task(data_dir)


def find_method(word: str) -> AbstractContestant:
    """Return the contestant that a word names: a contestant, an integrator, or a Python file with either.

    Args:
        word: ``NAME[:OPTION=VALUE]...`` or ``FILE.py``. Options of an integrator's name are those of the integrator
            and those of `LowRank`.

    Raises:
        ValueError: The name or an option is unknown, or the file does not define exactly one of them.
        RuntimeError: The file cannot be run.

    Example:
        >>> method = find_method("augmented_bug:coefficient_steps=4:start_rank=3")
        >>> method.integrator, method.start_rank
        (AugmentedBUG(coefficient_steps=4), 3)
    """
    name, *options = word.split(":")
    if name.endswith(".py"):
        if options:
            raise ValueError(f"options go with names, got {word!r}. Set the defaults in the file.")
        cls = class_in_file(name, AbstractContestant, AbstractIntegrator, purpose="method")
        return LowRank(integrator=cls()) if issubclass(cls, AbstractIntegrator) else cls()
    if name in discover(PACKAGE, AbstractContestant):
        return methods.build(METHOD, name, options)
    if name not in discover("dynarank.integrators", AbstractIntegrator):
        raise _unknown("method", name, available())
    known = {field.name for field in fields(LowRank)} - {"integrator"}
    own = [option for option in options if option.partition("=")[0] in known]
    integrator = methods.build(methods.INTEGRATOR, name, [option for option in options if option not in own])
    # Options that the integrator has itself are not asked for by name alone: only then is its instance needed.
    presets = {"integrator": integrator if len(own) < len(options) else name}
    return methods.build(METHOD, "low_rank", own, presets)


def available() -> dict[str, str]:
    """Return the first sentence of each contestant and integrator by name."""
    found = {**discover(PACKAGE, AbstractContestant), **discover("dynarank.integrators", AbstractIntegrator)}
    return {name: describe(cls)[0] for name, cls in found.items()}


def tasks() -> dict[str, str]:
    """Return the first sentence of each built-in task by name."""
    return {name: describe(cls)[0] for name, cls in TASKS.items()}


def _unknown(kind: str, name: str, known: Iterable[str]) -> ValueError:
    return ValueError(f"{str(unknown_name(kind, name, known)).removesuffix('.')}, {OWN_FILE}.")
