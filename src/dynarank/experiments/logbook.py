"""What a run notes in its history."""

import platform
from collections.abc import Iterable
from dataclasses import asdict, replace
from importlib import metadata
from typing import Any, final

import torch
from torch import nn

from dynarank import factors
from dynarank.events import RankEvent
from dynarank.experiments import measuring
from dynarank.experiments.config import TrainConfig, as_command
from dynarank.experiments.run_folder import RunFolder
from dynarank.factorize import trainable_parameters
from dynarank.factors import FactorPair
from dynarank.history import History
from dynarank.layers.base import AbstractLowRankLayer, low_rank_layers
from dynarank.stability import WeightWatch

LOOKS = 20


@final
class Logbook:
    """The history of a run, written by one process and kept in memory by the others.

    Args:
        folder: Folder of the run, None to keep the history in memory only.
        resume_at: Step of the checkpoint from which the run goes on.
    """

    def __init__(self, folder: RunFolder | None, *, resume_at: int | None = None) -> None:
        self.folder = folder
        self.history = History() if folder is None else History(folder.history, resume_at=resume_at)

    def describe(self, config: TrainConfig, **facts: Any) -> None:
        """Note the settings and the facts of a run, but not where its files are."""
        settings = replace(config, out=None)
        self.history.describe(
            name=f"{config.model} on {config.data}",
            command=as_command(settings),
            config=asdict(settings),
            seed=config.seed,
            versions={"dynarank": _version(), "torch": torch.__version__, "python": platform.python_version()},
            **facts,
        )

    def numbers(self, step: int, **numbers: Any) -> None:
        """Note numbers measured after ``step`` steps."""
        self.history.log(step=step, **numbers)

    def memory(self, step: int, model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
        """Note the bytes of weights, gradients and optimizer state, as they are just before the update of a step."""
        self.history.log(step=step, **measuring.bytes_in_training(model, optimizer))

    def size(self, step: int, model: nn.Module, *, deployed: int) -> None:
        """Note the parameters as deployed and as trained, the latter with candidate directions."""
        trained = trainable_parameters(model)
        self.history.log(step=step, deployed_parameters=deployed, trainable_parameters=trained)

    def events(self, events: Iterable[RankEvent], *, offset: int) -> None:
        """Note rank events; ``offset`` is the number of steps before the optimizer began to count."""
        for event in events:
            self.history.record(replace(event, step=event.step + offset))

    def spectra(self, step: int, model: nn.Module) -> None:
        """Note the singular values of every low-rank layer, candidate directions included."""
        values = {name: _singular_values(layer) for name, layer in low_rank_layers(model).items()}
        if values:
            self.history.spectrum(step=step, singular_values=values)

    def look(self, step: int, watch: WeightWatch, optimizer: torch.optim.Optimizer) -> None:
        """Note how the weights stand and how they have moved; the learning rate is that of the first group."""
        self.history.look(step=step, layers=watch.look(step), lr=optimizer.param_groups[0]["lr"])


def looks_after(step: int, *, steps: int) -> bool:
    """Whether the weights are looked at after a step: LOOKS times in a run of so many, the last step among them.

    The looks are as far apart as whole steps allow, so that what moved between two of them can be compared.

    Example:
        >>> [step for step in range(1, 51) if looks_after(step, steps=50)][-4:]
        [43, 45, 48, 50]
    """
    return step * LOOKS // steps > (step - 1) * LOOKS // steps


def _singular_values(layer: AbstractLowRankLayer) -> list[float]:
    point = layer.factors()
    return (point if isinstance(layer.point(), FactorPair) else factors.diagonalise(point)).sigma.tolist()


def _version() -> str:
    try:
        return metadata.version("dynarank")
    except metadata.PackageNotFoundError:
        return "unknown"  # run from a source tree that is not installed
