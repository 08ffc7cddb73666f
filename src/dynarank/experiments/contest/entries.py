"""Who takes part in a comparison: every contestant at every size, with the learning rates to try."""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from math import floor
from typing import final

import torch

from dynarank.experiments.contest.config import ContestConfig
from dynarank.experiments.contest.methods import find_method
from dynarank.experiments.contestants.base import AbstractContestant, Setting, Size
from dynarank.experiments.tasks.base import AbstractTask
from dynarank.factorize import deployed_parameters, factorize_


@final
@dataclass(frozen=True)
class Entry:
    """A contestant at one size: a row of the table.

    Args:
        method: Word that names it.
        size: How small its network is to be; None for contestants without sizes.
        parameters: What low-rank networks of this size store, where the contestant follows them and it is known.
        lrs: Learning rates to try, ascending.
        waits: Whether the parameters are known only when low-rank networks of this size have been trained.
    """

    method: str
    size: Size | None
    parameters: int | None
    lrs: tuple[float, ...]
    waits: bool = False

    @property
    def label(self) -> str:
        """What messages call it."""
        return f"{self.method} at {self.size.label}" if self.size is not None else self.method


def enter(config: ContestConfig, task: AbstractTask) -> list[Entry]:
    """Return all entries, those without sizes first, after everything that can be refused has been.

    Data are loaded, and every network and optimizer is made once, except for those whose size is not known yet.

    Raises:
        ValueError: A method or an option is unknown, there is no network of a size, or nobody sets the size that a
            contestant should follow.
        RuntimeError: A file or its code fails.
    """
    contestants = {word: find_method(word) for word in config.words}
    with torch.random.fork_rng(devices=range(torch.cuda.device_count())):
        entries = list(_entries(config, task, contestants))
        next(task.training_batches(config.tune_seed))
        for entry in entries:
            if not entry.waits:
                _try_out(entry, config, task, contestants[entry.method])
    return entries


def settle(entry: Entry, parameters: int) -> Entry:
    """Return an entry that waited, now that it is known what the low-rank networks of its size store."""
    return replace(entry, parameters=parameters, waits=False)


def _entries(config: ContestConfig, task: AbstractTask, contestants: dict[str, AbstractContestant]) -> Iterator[Entry]:
    rates = config.own_lrs()
    lrs = {
        word: rates.get(word) or tuple(sorted(factor * contestant.lr(task) for factor in config.factors))
        for word, contestant in contestants.items()
    }
    yield from (Entry(word, None, None, lrs[word]) for word, one in contestants.items() if not one.sized)
    leaders = [word for word, one in contestants.items() if one.sized and not one.follows]
    for size in config.sizes:
        parameters = _parameters(size, task)
        for word, contestant in contestants.items():
            if contestant.sized and not contestant.follows:
                yield Entry(word, size, None, lrs[word])
            elif contestant.sized and (parameters is not None or leaders):
                yield Entry(word, size, parameters, lrs[word], waits=parameters is None)
            elif contestant.sized:
                raise ValueError(
                    f"{word} takes its size from low-rank networks, and none of the methods trains one that finds its "
                    f"ranks by {size.label}. Add one, such as tangent_muon, or give size or rank."
                )


def _parameters(size: Size, task: AbstractTask) -> int | None:
    """Return what low-rank networks of a size store at most, or None where training decides."""
    if size.fraction is None and size.rank is None:
        return None
    model = task.model()
    if size.rank is not None:
        factorize_(model, rank=size.rank)
        return deployed_parameters(model)
    return floor(size.fraction * deployed_parameters(model) + 1e-6)  # type: ignore[operator]


def _try_out(entry: Entry, config: ContestConfig, task: AbstractTask, contestant: AbstractContestant) -> None:
    setting = Setting(entry.lrs[0], config.steps or task.training_steps, entry.size, entry.parameters)
    try:
        contestant.optimizers(task, contestant.network(task, setting), setting)
    except ValueError as error:
        raise ValueError(f"{entry.label}: {error}") from error
