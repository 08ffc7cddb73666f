"""The networks that a low-rank network has to face: the dense one, and a narrower dense one of equal size."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

from torch import nn

from dynarank.experiments import networks
from dynarank.experiments.config import TrainConfig
from dynarank.experiments.defaults import DEFAULTS
from dynarank.experiments.loop import Loop, make_batches
from dynarank.experiments.measuring import deployed_parameters
from dynarank.experiments.moments import Moments
from dynarank.experiments.problem import Problem, Quality
from dynarank.experiments.processes import Processes
from dynarank.experiments.progress import Progress, Report

DENSE, NARROWER = "dense", "narrower dense"


@dataclass(frozen=True)
class Contender:
    """A dense network after training.

    Args:
        model: The network.
        lr: The learning rate it was trained with.
        score: Its measure on the validation part.
        seconds: Seconds of training.
    """

    model: nn.Module
    lr: float
    score: float
    seconds: float


@dataclass(frozen=True)
class Comparison:
    """Trains dense networks for as long as the low-rank one.

    They see the same batches in the same order, with the same shape of learning rates. Of the few learning rates in
    `dynarank.experiments.defaults` validation chooses; the test part is looked at once, with the chosen one.

    Args:
        problem: Data and settings.
        processes: Who takes part.
        moments: The moments of the low-rank run.
        dense_parameters: Parameters of the dense network.
        tell: Called with the progress.
    """

    problem: Problem
    processes: Processes
    moments: Moments
    dense_parameters: int
    tell: Report

    def dense(self) -> dict[str, Any]:
        """Train the dense network and return its row of the table."""
        return self._row(DENSE, self.problem.build)

    def narrower(self, parameters: int) -> dict[str, Any]:
        """Train a narrower dense network of at most ``parameters`` parameters and return its row of the table.

        Raises:
            ValueError: If there is no such network.
        """
        self.problem.build_narrower(parameters)
        return self._row(NARROWER, partial(self.problem.build_narrower, parameters))

    def _row(self, name: str, build: Callable[[], nn.Module]) -> dict[str, Any]:
        best: Contender | None = None
        for lr in DEFAULTS[self.problem.config.data].dense_lrs:
            other = self._train(name, build(), lr)
            if best is None or self.problem.better(other.score, best.score):
                best = other
        assert best is not None
        return row(
            name,
            self.problem.evaluate(best.model, "test"),
            parameters=deployed_parameters(best.model),
            dense_parameters=self.dense_parameters,
            seconds=best.seconds,
            steps=self.moments.steps,
            lr=best.lr,
        )

    def _train(self, name: str, model: nn.Module, lr: float) -> Contender:
        steps = self.moments.steps
        loop = Loop(self.problem, self.processes, make_batches(self.problem, self.processes))
        trainee = networks.dense_trainee(model, lr=lr, steps=steps, processes=self.processes)
        score: float | None = None
        parameters = deployed_parameters(model)
        for step in range(1, steps + 1):
            loop.take_step(trainee)
            ended = self.moments.ends_epoch(step)
            if ended:
                loop.end_epoch()
                score = self.problem.score(self.problem.evaluate(model, "validation"))
            if ended or self.moments.among(step, number=100):
                self.tell(
                    Progress(
                        network=name,
                        step=step,
                        steps=steps,
                        epoch=step // self.moments.per_epoch,
                        epochs=steps // self.moments.per_epoch,
                        loss=loop.loss(),
                        measure=self.problem.measure,
                        validation=score,
                        parameters=parameters,
                        dense_parameters=self.dense_parameters,
                        event="epoch" if ended else "step",
                        note=f"learning rate {lr:g}",
                    )
                )
        assert score is not None
        return Contender(model, lr, score, loop.seconds)


def method(config: TrainConfig) -> str:
    """Return in a sentence how the dense networks were trained."""
    rates = [f"{lr:g}" for lr in DEFAULTS[config.data].dense_lrs]
    choice = f"Their learning rate is {rates[0]}."
    if len(rates) > 1:
        own = config.base_lr if config.method == "oialr" else config.lr
        choice = f"Validation chose their learning rates from {' and '.join(rates)}; low rank had one, {own:g}."
    return f"Dense networks: gradient descent with Nesterov momentum, same batches and epochs. {choice}"


def row(
    name: str, test: Quality, *, parameters: int, dense_parameters: int, seconds: float, steps: int, lr: float | None
) -> dict[str, Any]:
    """Return what the table says of one network.

    Example:
        >>> row("dense", Quality(0.1, 0.97), parameters=50, dense_parameters=100, seconds=3.0, steps=1000, lr=0.1)
        {'name': 'dense', 'test_accuracy': 0.97, 'parameters': 50, 'percent_of_dense': 50.0, 'seconds': 3.0,
         'ms_per_step': 3.0, 'lr': 0.1}
    """
    measure = {"test_loss": test.loss} if test.accuracy is None else {"test_accuracy": test.accuracy}
    return {
        "name": name,
        **measure,
        "parameters": parameters,
        "percent_of_dense": round(100 * parameters / dense_parameters, 2),
        "seconds": round(seconds, 2),
        "ms_per_step": round(1000 * seconds / steps, 3),
        "lr": lr,
    }
