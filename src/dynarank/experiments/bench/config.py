"""What ``dynarank bench`` does: its options as data."""

import shlex
from dataclasses import dataclass
from math import inf
from typing import Any, final

import torch

from dynarank._discovery import discover
from dynarank.errors import unknown_name
from dynarank.experiments import methods
from dynarank.experiments.bench.cases.base import AbstractCase
from dynarank.experiments.python_file import class_in_file
from dynarank.integrators.base import AbstractIntegrator

PACKAGE = "dynarank.experiments.bench.cases"
DEVICES = ("cpu", "cuda")
DENSE, AGAIN, PLAIN, PLAIN_AGAIN = ALWAYS = ("dense", "dense again", "plain", "plain again")
METHODS = ("gauge_fixed:early=0", "gauge_fixed_muon:early=0", "tangent_muon", "tangent_heavy_ball", "parallel_bug")


@final
@dataclass(frozen=True)
class BenchConfig:
    """Settings of a benchmark.

    Args:
        cases: Cases by name, or Python files that define one class derived from AbstractCase each; all by default.
        methods: Integrators by name, each with options as NAME:OPTION=VALUE, or a Python file that defines one;
            separated by commas or spaces. Dense networks and plain training of the two factors are always there.
        device: cpu or cuda.
        threads: Threads of torch.
        seconds: About how long to measure the steps of each series, at least six rounds. Methods of which 25 steps take
            more than a fifth of it are measured by fewer, and marked.

    Raises:
        ValueError: A value is out of range, a name is unknown, or there is no such device.

    Example:
        >>> BenchConfig(("tiny",), methods=("tangent_muon,parallel_bug",)).words
        ('tangent_muon', 'parallel_bug')
    """

    cases: tuple[str, ...] = ()
    methods: tuple[str, ...] = METHODS
    device: str = "cpu"
    threads: int = 1
    seconds: float = 10.0

    def __post_init__(self) -> None:
        for name in ("cases", "words"):
            values = getattr(self, name)
            if len(set(values)) < len(values):
                shown = "methods" if name == "words" else name
                raise ValueError(f"{shown} must differ from each other, got {' '.join(values)}.")
        if taken := [word for word in self.words if word in ALWAYS]:
            raise ValueError(f"methods are integrators, got {taken[0]}, which is always there. Leave it away.")
        if self.device not in DEVICES:
            raise ValueError(f"device must be {' or '.join(DEVICES)}, got {self.device!r}.")
        if self.device == "cuda" and not torch.cuda.is_available():
            raise ValueError("device cuda needs a GPU that torch can use, and there is none. Leave --device away.")
        if self.threads < 1:
            raise ValueError(f"threads must be at least 1, got {self.threads}.")
        if not 0 < self.seconds < inf:
            raise ValueError(f"seconds must be above 0, got {self.seconds}.")

    @property
    def words(self) -> tuple[str, ...]:
        """The methods, one word each."""
        return tuple(word for text in self.methods for word in text.split(",") if word)


def find_case(name: str) -> AbstractCase:
    """Return the case of that name, or the one that a Python file defines.

    Raises:
        ValueError: The name is unknown, or the file does not define exactly one case.
        RuntimeError: The file cannot be run.
    """
    if name.endswith(".py"):
        return class_in_file(name, AbstractCase, purpose="case")()
    if name not in discover(PACKAGE, AbstractCase):
        raise unknown_name("case", name, discover(PACKAGE, AbstractCase))
    return discover(PACKAGE, AbstractCase)[name]()


def find_integrator(word: str) -> AbstractIntegrator:
    """Return the integrator that a word names.

    Args:
        word: ``NAME[:OPTION=VALUE]...`` or ``FILE.py``.

    Raises:
        ValueError: The name or an option is unknown, or the file does not define exactly one integrator.
        RuntimeError: The file cannot be run.

    Example:
        >>> find_integrator("augmented_bug:coefficient_steps=4")
        AugmentedBUG(coefficient_steps=4)
    """
    name, *options = word.split(":")
    if name.endswith(".py"):
        return class_in_file(word, AbstractIntegrator, purpose="integrator")()
    return methods.build(methods.Kind("method", "dynarank.integrators", AbstractIntegrator, "methods"), name, options)


def as_command(config: BenchConfig, out: str) -> str:
    """Return the command line that carries out a benchmark, or goes on with it.

    Example:
        >>> as_command(BenchConfig(("tiny",), seconds=5.0), "runs/bench-1")
        'dynarank bench tiny --seconds 5 --out runs/bench-1'
    """
    words: list[Any] = ["dynarank", "bench", *config.cases]
    if config.methods != METHODS:
        words += ["--methods", *config.methods]
    for name in ("device", "threads", "seconds"):
        if (value := getattr(config, name)) != getattr(BenchConfig, name):
            words += [f"--{name}", f"{value:g}" if isinstance(value, float) else value]
    return shlex.join([*map(str, words), "--out", out])
