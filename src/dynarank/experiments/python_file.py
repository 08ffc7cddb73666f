"""A Python file of the user, run as a module: a task, a model, a method."""

import importlib.util
import inspect
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType


def run_file(path: Path, *, purpose: str) -> ModuleType:
    """Run a Python file and return its module.

    Whatever the file raises is raised here too.

    Args:
        path: The file; its name ends in .py.
        purpose: What it defines, in one word: the name of its module is made of it.
    """
    name = f"dynarank_{purpose}_{path.stem}"
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # dataclasses and pickle look their module up there
    spec.loader.exec_module(module)
    return module


def class_in_file(path: str, *bases: type, purpose: str) -> type:
    """Return the one final class that a .py file defines and that derives from one of the bases.

    Imports of the file find its own folder, as for a script.

    Raises:
        ValueError: There is no such file, or not exactly one such class in it.
        RuntimeError: The file cannot be run.
    """
    file = Path(path)
    if not file.is_file():
        raise ValueError(f"there is no file {path}.")
    make_importable(file.resolve().parent)
    try:
        module = run_file(file, purpose=purpose)
    except Exception as error:
        raise RuntimeError(f"{path}: the file failed: {type(error).__name__}: {error}") from error
    found = [
        cls
        for _, cls in inspect.getmembers(module, inspect.isclass)
        if cls.__module__ == module.__name__ and issubclass(cls, bases) and not inspect.isabstract(cls)
    ]
    if len(found) != 1:
        names = " or ".join(base.__name__ for base in bases)
        raise ValueError(f"{path} must define one final class that derives from {names}, found {len(found)}.")
    return found[0]


def make_importable(folder: Path) -> None:
    """Put a folder on the path of imports, where what it holds may import its neighbours later on too."""
    if str(folder) not in sys.path:
        sys.path.insert(0, str(folder))


@contextmanager
def importable(folder: Path) -> Iterator[None]:
    """Put a folder on the path of imports for a while."""
    sys.path.insert(0, str(folder))
    try:
        yield
    finally:
        sys.path.remove(str(folder))
