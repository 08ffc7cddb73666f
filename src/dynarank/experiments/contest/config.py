"""What ``dynarank compare`` does: its options as data."""

import math
import shlex
from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Any, final

from dynarank.experiments.contestants.base import Size

# Every row of a folder is made with the same values of these; the others may be extended later.
SHARED = ("task", "steps", "tune_steps", "tune_seed")


@final
@dataclass(frozen=True)
class ContestConfig:
    """Settings of a comparison.

    Args:
        task: A built-in task, or a Python file that defines one class derived from AbstractTask.
        methods: Contestants and integrators by name, each with options as NAME:OPTION=VALUE, or a Python file that
            defines one; separated by commas or spaces. --list shows the names.
        size: Sizes, as fractions of the dense network's parameters. Default: 0.1, where nothing else says how small.
        rank: Ranks of every layer, fixed; beside or instead of sizes, as the next two.
        tolerance: Relative tails that may be cut from every layer.
        rank_policy: Rank policies by name, each with options as NAME:OPTION=VALUE.
        seeds: Seeds of the runs that are reported.
        steps: Steps of training; those of the task by default.
        factors: Learning rates to try, as factors of what each method suggests for the task.
        lrs: Learning rates of single methods instead, as many as there are factors: METHOD=LR,LR,LR.
        tune_seed: Seed of the runs that choose learning rates, none of those reported.
        tune_steps: Steps of the runs that choose learning rates. Default: as many as for the others.
        seconds: About how long to measure the time of a step, for each method and size.
        jobs: Runs at a time, each a process with one thread.
        data_dir: Folder with the data; without it the usual folders are searched, then they are downloaded.

    Raises:
        ValueError: A value is out of range, or options contradict each other.

    Example:
        >>> ContestConfig("lenet5", methods=("dense,narrower", "tangent_muon"), size=(0.05,)).words
        ('dense', 'narrower', 'tangent_muon')
    """

    task: str = ""
    methods: tuple[str, ...] = ("dense", "narrower", "gauge_fixed_muon", "plain_factors_adamw")
    size: tuple[float, ...] = ()
    rank: tuple[int, ...] = ()
    tolerance: tuple[float, ...] = ()
    rank_policy: tuple[str, ...] = ()
    seeds: tuple[int, ...] = (0, 1, 2)
    steps: int | None = None
    factors: tuple[float, ...] = (0.25, 0.5, 1.0, 2.0, 4.0)
    lrs: tuple[str, ...] = ()
    tune_seed: int = 100
    tune_steps: int | None = None
    seconds: float = 2.0
    jobs: int = 1
    data_dir: str | None = None

    def __post_init__(self) -> None:
        if not self.task:
            raise ValueError("name a task or a Python file that defines one; `dynarank compare --list` shows names.")
        if not self.words:
            raise ValueError("methods must name at least one contestant; `dynarank compare --list` shows them.")
        for name in ("words", "size", "rank", "tolerance", "rank_policy", "seeds", "factors"):
            values = getattr(self, name)
            if len(set(values)) < len(values):
                shown = "methods" if name == "words" else name
                raise ValueError(f"{shown} must differ from each other, got {' '.join(map(str, values))}.")
        for name in ("size", "tolerance"):
            if any(not 0 < value < 1 for value in getattr(self, name)):
                raise ValueError(f"{name} must be between 0 and 1, got {_listed(getattr(self, name))}.")
        for name in ("steps", "tune_steps", "jobs"):
            if (value := getattr(self, name)) is not None and value < 1:
                raise ValueError(f"{name} must be at least 1, got {value}.")
        if any(rank < 1 for rank in self.rank):
            raise ValueError(f"rank must be at least 1, got {_listed(self.rank)}.")
        if not self.seconds >= 0:
            raise ValueError(f"seconds must be at least 0, got {self.seconds}.")
        self._check_runs()

    def _check_runs(self) -> None:
        if not self.seeds:
            raise ValueError("seeds must hold at least one, got none.")
        if self.tune_seed in self.seeds:
            raise ValueError(
                f"tune_seed must be none of the seeds that are reported, got {self.tune_seed} among "
                f"{_listed(self.seeds)}."
            )
        if not self.factors or any(not 0 < value < math.inf for value in self.factors):
            raise ValueError(f"factors must be above 0, got {_listed(self.factors) or 'none'}.")
        for word, rates in self.own_lrs().items():
            if word not in self.words:
                raise ValueError(f"lrs are given for {word!r}, which is none of the methods {_listed(self.words)}.")
            if len(rates) != len(self.factors):
                raise ValueError(
                    f"every method is tuned over as many learning rates: lrs of {word} must be {len(self.factors)}, as "
                    f"there are factors, got {len(rates)}."
                )

    @property
    def words(self) -> tuple[str, ...]:
        """The methods, one word each."""
        return tuple(word for text in self.methods for word in text.split(",") if word)

    @property
    def sizes(self) -> tuple[Size, ...]:
        """The sizes."""
        return (
            *(Size(rank=rank) for rank in self.rank),
            *(Size(tolerance=tolerance) for tolerance in self.tolerance),
            *(Size(policy=policy) for policy in self.rank_policy),
            *(Size(fraction=fraction) for fraction in self.size),
        ) or (Size(fraction=0.1),)

    def own_lrs(self) -> dict[str, tuple[float, ...]]:
        """Return the learning rates of methods that have their own, ascending.

        Raises:
            ValueError: They cannot be read.
        """
        found = {}
        for text in self.lrs:
            word, _, rates = text.rpartition("=")
            try:
                found[word] = tuple(sorted({float(rate) for rate in rates.split(",")}))
            except ValueError:
                found[word] = ()
            if not word or not found[word] or not 0 < found[word][0] <= found[word][-1] < math.inf:
                raise ValueError(f"lrs must be METHOD=LR,LR,LR with numbers above 0, got {text!r}.")
        return found


def as_command(config: ContestConfig, out: str) -> str:
    """Return the command line that carries out a comparison, or goes on with it.

    Example:
        >>> as_command(ContestConfig("gpt", methods=("dense", "tangent_muon"), rank=(8,)), "runs/a")
        'dynarank compare gpt --methods dense tangent_muon --rank 8 --out runs/a'
    """
    words = ["dynarank", "compare", config.task]
    for field in fields(config)[1:]:
        value = getattr(config, field.name)
        if value != field.default:
            words += [f"--{field.name.replace('_', '-')}", *_words(value)]
    return shlex.join([*words, "--out", out])


def _words(value: Any) -> Sequence[str]:
    items = value if isinstance(value, tuple) else (value,)
    return [f"{item:g}" if isinstance(item, float) else str(item) for item in items]


def _listed(values: Sequence[Any]) -> str:
    return " ".join(map(str, values))
