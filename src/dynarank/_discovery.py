"""Finds the methods in a folder: one file, one final class, registered under the file's name."""

import importlib
import inspect
import pkgutil
from functools import cache

from dynarank.errors import unknown_name


@cache
def discover(package: str, base: type) -> dict[str, type]:
    """Return ``{file name: class}`` for every concrete subclass of ``base`` in ``package``.

    A file whose name starts with an underscore, or is called ``base``, is not a method.

    Args:
        package: Dotted name of the folder, such as ``"dynarank.integrators"``.
        base: Abstract class that every method derives from.

    Raises:
        RuntimeError: A file holds no final class, or more than one.
    """
    found = {}
    folder = importlib.import_module(package)
    for info in pkgutil.iter_modules(folder.__path__):
        if info.name.startswith("_") or info.name == "base":
            continue
        module = importlib.import_module(f"{package}.{info.name}")
        classes = [
            cls
            for _, cls in inspect.getmembers(module, inspect.isclass)
            if cls.__module__ == module.__name__ and issubclass(cls, base) and not inspect.isabstract(cls)
        ]
        if len(classes) != 1:
            raise RuntimeError(f"{module.__name__} must hold one final {base.__name__}, found {len(classes)}.")
        found[info.name] = classes[0]
    return found


def resolve(kind: str, package: str, base: type, method: object, **options: object) -> object:
    """Return ``method`` itself if it is an instance of ``base``, or build the registered class of that name.

    Args:
        kind: What the user calls it, for messages: ``"integrator"``.
        package: Dotted name of the folder.
        base: Abstract class that every method derives from.
        method: Name of a method, or an instance.
        options: Arguments of the class that is built; none are allowed beside an instance.

    Raises:
        ValueError: The name is unknown.
        TypeError: ``method`` is neither a name nor an instance of ``base``, or there are options for an instance.
    """
    if isinstance(method, base):
        if options:
            raise TypeError(f"{kind}: options {', '.join(options)} need a name, got an instance; build it with them.")
        return method
    if not isinstance(method, str):
        raise TypeError(f"{kind} must be a name or an instance of {base.__name__}, got {type(method).__name__}.")
    methods = discover(package, base)
    if method not in methods:
        raise unknown_name(kind, method, methods)
    return methods[method](**options)


def describe(cls: type) -> tuple[str, str]:
    """Return the first sentence of a method's docstring and its reference, for lists and tables."""
    text = inspect.getdoc(cls) or ""
    reference = text.split("Reference:", 1)[1].strip() if "Reference:" in text else ""
    return text.split("\n", 1)[0].strip(), " ".join(reference.split("\n\n")[0].split())
