"""Exceptions that callers may want to catch by name. Everything else raises ValueError, TypeError or RuntimeError."""

from collections.abc import Iterable


class NonFiniteGradientError(RuntimeError):
    """A gradient holds NaN or infinity; the factors were left as they were before the step."""


def missing_extra(package: str, extra: str) -> ImportError:
    """Return the error for an optional dependency that is not installed.

    Example:
        >>> str(missing_extra("matplotlib", "viz"))
        'this needs matplotlib, which is not installed. Run: pip install "dynarank[viz]"'
    """
    return ImportError(f'this needs {package}, which is not installed. Run: pip install "dynarank[{extra}]"')


def unknown_name(kind: str, name: object, available: Iterable[str]) -> ValueError:
    """Return the error for a name that is not registered.

    Example:
        >>> str(unknown_name("integrator", "bug", ["parallel_bug", "augmented_bug"]))
        "unknown integrator 'bug'. Available: augmented_bug, parallel_bug."
    """
    return ValueError(f"unknown {kind} {name!r}. Available: {', '.join(sorted(available))}.")
