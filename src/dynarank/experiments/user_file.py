"""A subject that a user wrote: a Python file with functions of known names."""

import inspect
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any, final

from torch import nn

from dynarank.experiments.python_file import make_importable, run_file
from dynarank.experiments.subject import FALLING, Subject
from dynarank.measure import call


def read_subject(path: str | Path) -> Subject:
    """Return the subject that a Python file defines.

    The file is run, with its folder on the path of imports as for a script. It defines functions:

    * ``model()``, the only one that must be there: the trained network;
    * ``evaluate(model)``: the score of a network on test data, or several by name, with ``measure = "accuracy"`` the
      name of the score that counts and ``higher_is_better = True``;
    * ``validate(model)``: the same on other data, for choices;
    * ``training_batches(seed)``: a ``DataLoader`` or an iterator; ``loss(outputs, batch)``;
    * ``calibration_batches()``: a few batches without augmentation; by default the first ones of training;
    * ``narrower(parameters)``: a narrower network of at most so many parameters;
    * ``distance(outputs, wanted)``: the loss of distillation where the outputs are no logits;
    * ``forward(model, batch)``, where a batch enters otherwise than in ``dynarank.measure.call``;
    * ``example_batch = ...``: a batch as in use.

    Args:
        path: The file.

    Raises:
        ValueError: There is no such file, it has no ``model``, or a function cannot be called as it will be.
        RuntimeError: The file cannot be run. Its functions raise this too where they fail, with their names.
    """
    path = Path(path)
    if not path.is_file():
        raise ValueError(f"there is no file {path}. A task is a Python file that defines model(), or a built-in name.")
    module = _run(path)
    functions = {name: kind.guarded(path, module, name) for name, kind in KINDS.items() if hasattr(module, name)}
    if "model" not in functions:
        raise ValueError(f"{path} defines no model(), which returns the trained network. Define it.")
    functions.setdefault("forward", Kind(("model", "batch")).wrapped(path, "the network", call))
    measure, higher = getattr(module, "measure", "accuracy"), getattr(module, "higher_is_better", None)
    if not isinstance(measure, str) or not isinstance(higher, bool | None):
        raise ValueError(
            f"{path}: measure must be a text and higher_is_better True or False, got {measure!r} and {higher!r}."
        )
    if higher is None:
        higher = not any(word in measure.lower() for word in FALLING)
    example = getattr(module, "example_batch", None)
    return Subject(path.stem, measure=measure, higher_is_better=higher, example_batch=example, **functions)


def _run(path: Path) -> ModuleType:
    if path.suffix != ".py":
        raise ValueError(f"{path} must be a Python file: its name must end in .py.")
    make_importable(path.resolve().parent)
    try:
        return run_file(path, purpose="task")
    except Exception as error:
        raise _failure(path, "the file", error) from error


def _failure(path: Path, name: str, error: Exception) -> RuntimeError:
    return RuntimeError(f"{path}: {name} failed: {type(error).__name__}: {error}")


# --- functions ---------------------------------------------------------------------------------------------------


@final
@dataclass(frozen=True)
class Kind:
    """What a function of the file is called with, and what is made of what it returns.

    Args:
        arguments: Names of its arguments.
        taken: Returns what it returned as a subject has it, or raises TypeError.
    """

    arguments: tuple[str, ...]
    taken: Callable[[Any], Any] = lambda found: found

    def guarded(self, path: Path, module: ModuleType, name: str) -> Callable[..., Any]:
        """Return the function of that name, checked for how it is called.

        Raises:
            ValueError: It is no function, or takes other arguments.
        """
        function, wanted = getattr(module, name), f"{name}({', '.join(self.arguments)})"
        if not callable(function):
            raise ValueError(f"{path}: {name} must be a function {wanted}, got {type(function).__name__}.")
        signature = inspect.signature(function)
        try:
            signature.bind(*self.arguments)
        except TypeError:
            raise ValueError(f"{path}: {name} must be callable as {wanted}, got {name}{signature}.") from None
        return self.wrapped(path, f"{name}()", function)

    def wrapped(self, path: Path, name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        """Return the function, which names itself where it fails."""

        def run(*arguments: Any) -> Any:
            try:
                found = self.taken(function(*arguments))
            except Exception as error:
                raise _failure(path, name, error) from error
            return _GuardedBatches(path, name, found) if self.taken is _batches else found

        return run


@final
@dataclass(frozen=True)
class _GuardedBatches:
    """Batches that name their function where making them fails; gone through again if what it returned can be."""

    path: Path
    name: str
    batches: Iterable[Any]

    def __iter__(self) -> Iterator[Any]:
        try:
            yield from self.batches
        except Exception as error:
            raise _failure(self.path, self.name, error) from error


def _network(found: Any) -> nn.Module:
    if not isinstance(found, nn.Module):
        raise TypeError(f"it must return a torch.nn.Module, got {type(found).__name__}")
    return found


def _batches(found: Any) -> Iterable[Any]:
    if not isinstance(found, Iterable):
        raise TypeError(f"it must return batches: a DataLoader, a list or an iterator, got {type(found).__name__}")
    return found


def _scores(found: Any) -> float | dict[str, float]:
    if isinstance(found, Mapping):
        return {str(name): float(value) for name, value in found.items()}
    return float(found)


KINDS = {
    "model": Kind((), _network),
    "evaluate": Kind(("model",), _scores),
    "validate": Kind(("model",), _scores),
    "training_batches": Kind(("seed",), _batches),
    "loss": Kind(("outputs", "batch")),
    "calibration_batches": Kind((), _batches),
    "distance": Kind(("outputs", "wanted")),
    "narrower": Kind(("parameters",), _network),
    "forward": Kind(("model", "batch")),
}
