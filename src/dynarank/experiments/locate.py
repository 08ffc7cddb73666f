"""A module named in one word, and weights for it: ``file.py:function``, ``package.module:function``."""

import importlib
import os
from pathlib import Path
from types import ModuleType

from torch import nn

from dynarank.analysis.weight_files import stored_tensors
from dynarank.checkpoint import load_model
from dynarank.experiments.python_file import importable, run_file

FORMS = "Give file.py:function or package.module:function, whose function returns a torch.nn.Module"
MANIFEST = "manifest.json"  # in a folder that save or save_model wrote


def load_module(spec: str) -> nn.Module:
    """Return what a function returns that is named by its file or module.

    The code is run. Imports find the folder of the file, or the current folder, as for a script.

    Args:
        spec: ``"file.py:function"`` or ``"package.module:function"``. The function takes no arguments; a class of
            modules will do too.

    Raises:
        ValueError: The word has no colon, there is no such file, module or function, or it returns something else.
        RuntimeError: Its code fails.

    Example:
        >>> load_module("dynarank.models.lenet5:LeNet5").fc1
        Linear(in_features=800, out_features=500, bias=True)
    """
    place, _, name = spec.rpartition(":")
    if not place or not name:
        raise ValueError(f"{spec!r} names no function. {FORMS}.")
    path = Path(place)
    is_file = path.suffix == ".py"
    with importable(path.resolve().parent if is_file else Path.cwd()):
        module = _module_of_file(path) if is_file else _module_called(place)
        function = getattr(module, name, None)
        if not callable(function):
            raise ValueError(f"{place} has no function {name!r}. {FORMS}.")
        try:
            found = function()
        except Exception as error:
            raise _failure(f"{spec}()", error) from error
    if not isinstance(found, nn.Module):
        raise ValueError(f"{spec}() must return a torch.nn.Module, got {type(found).__name__}.")
    return found


def load_weights_(model: nn.Module, weights: str | os.PathLike[str]) -> None:
    """Load weights into a model, in place: a file or folder as ``analyze`` takes it, or what ``save_model`` wrote.

    Raises:
        FileNotFoundError: There is no such file.
        ValueError: It is no file of weights, or they do not fit the model.
    """
    if (Path(weights) / MANIFEST).is_file():
        load_model(weights, model)
        return
    state = {tensor.name: tensor.load() for tensor in stored_tensors(weights)}
    missing = [name for name in model.state_dict() if name not in state]
    if missing:
        held = ", ".join(list(state)[:3])
        raise ValueError(
            f"{weights} does not fit {type(model).__name__}: it has no {missing[0]!r}, one of {len(missing)} that are "
            f"missing. It holds {held} and others."
        )
    try:
        model.load_state_dict(state)
    except RuntimeError as error:
        first = " ".join(str(error).split("\n\t")[1:2]) or str(error)
        raise ValueError(f"{weights} does not fit {type(model).__name__}: {first}") from None


def _module_of_file(path: Path) -> ModuleType:
    if not path.is_file():
        raise ValueError(f"there is no file {path}. {FORMS}.")
    try:
        return run_file(path, purpose="model")
    except Exception as error:
        raise _failure(str(path), error) from error


def _module_called(name: str) -> ModuleType:
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        if error.name is None or not f"{name}.".startswith(f"{error.name}."):
            raise _failure(name, error) from error  # the module is there, but not what it imports
        raise ValueError(f"there is no module {name}. {FORMS}.") from None
    except Exception as error:
        raise _failure(name, error) from error


def _failure(what: str, error: Exception) -> RuntimeError:
    return RuntimeError(f"{what} failed: {type(error).__name__}: {error}")
