"""What compression is proved on: a trained network and whatever is known of its data."""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from itertools import islice
from typing import Any, final

import torch
from torch import Tensor, nn

from dynarank.checkpoint import load_model
from dynarank.compress.distillation import Distance
from dynarank.compress.sensitivity import Divergence, kl_divergence, relative_error
from dynarank.errors import unknown_name
from dynarank.experiments.tasks import TASKS
from dynarank.measure import Forward, call

CALIBRATION_BATCHES = 8  # of training, where there are none for calibration
FALLING = ("loss", "error", "perplexity")  # names of scores that should be low

Judge = Callable[[nn.Module], float | Mapping[str, float]]


@final
@dataclass(frozen=True)
class Subject:
    """A trained network with its data; what is None is not known, and what needs it cannot be done.

    Args:
        name: What tables call it.
        model: Returns the trained network.
        evaluate: Returns the score of a network in evaluation mode, or several by name, on data it was not trained on.
        validate: The same on other data: for choices, so that `evaluate` stays honest.
        measure: Name of the score that counts.
        higher_is_better: Whether that score should be high.
        training_batches: Returns training batches for a seed; where they end they are gone through again.
        loss: Returns the loss, given outputs and batch.
        calibration_batches: Returns a few batches of training data without augmentation.
        narrower: Returns a narrower network of at most so many parameters, freshly initialised.
        example_batch: A batch as the network meets it in use; by default the first one of calibration.
        forward: How a batch enters the network.
        training_forward: The same in training, where that differs.
        divergence: What change of the outputs counts when layers are weighed against each other.
        distance: Loss between outputs and those of the network as given, for distillation; `SoftTargets` by default.
    """

    name: str
    model: Callable[[], nn.Module]
    evaluate: Judge | None = None
    validate: Judge | None = None
    measure: str = "accuracy"
    higher_is_better: bool = True
    training_batches: Callable[[int], Iterable[Any]] | None = None
    loss: Callable[[Any, Any], Tensor] | None = None
    calibration_batches: Callable[[], Iterable[Any]] | None = None
    narrower: Callable[[int], nn.Module] | None = None
    example_batch: Any = None
    forward: Forward = call
    training_forward: Forward | None = None
    divergence: Divergence = relative_error
    distance: Distance | None = None

    def scores(self, model: nn.Module) -> dict[str, float]:
        """Return all scores of a network by name, the one that counts first; empty where it cannot be evaluated."""
        return self._judged(self.evaluate, model) if self.evaluate is not None else {}

    def choice_score(self, model: nn.Module) -> float:
        """Return the score that choices are made by.

        Raises:
            ValueError: The network cannot be evaluated.
        """
        judge = self.validate or self.evaluate
        if judge is None:
            raise self.lacks("evaluate(model)", "a choice by score")
        return self._judged(judge, model)[self.measure]

    def calibration(self) -> list[Any] | None:
        """Return the batches for calibration, else the first ones of training, else None."""
        if self.calibration_batches is not None:
            return list(self.calibration_batches())
        if self.training_batches is not None:
            return list(islice(self.training_batches(0), CALIBRATION_BATCHES))
        return None

    def example(self) -> Any:
        """Return a batch as the network meets it in use, or None."""
        if self.example_batch is not None:
            return self.example_batch
        return next(iter(self.calibration() or []), None)

    def lacks(self, function: str, purpose: str) -> ValueError:
        """Return the error for something that is asked for and cannot be done."""
        return ValueError(f"{purpose} needs {function}, which {self.name} does not define. Define it.")

    def _judged(self, judge: Judge, model: nn.Module) -> dict[str, float]:
        with torch.no_grad():
            found = judge(model.eval())
        scores = {name: float(value) for name, value in found.items()} if isinstance(found, Mapping) else None
        if scores is None:
            return {self.measure: float(found)}  # type: ignore[arg-type]
        if self.measure not in scores:
            raise ValueError(
                f"{self.name}: evaluate returned {', '.join(scores) or 'nothing'}, but measure is {self.measure!r}. "
                "Return it as well, or name another measure."
            )
        return {self.measure: scores.pop(self.measure), **scores}


def trained_subject(name: str, weights: str, *, data_dir: str | None = None) -> Subject:
    """Return a built-in task with the weights that ``dynarank pretrain`` has saved.

    Args:
        name: Name of the task.
        weights: Folder of the trained network.
        data_dir: Folder with the data, where the usual folders are not meant.

    Raises:
        ValueError: The name is unknown.
    """
    if name not in TASKS:
        raise unknown_name("task", name, TASKS)
    task = TASKS[name](data_dir)

    def model() -> nn.Module:
        network = task.model()
        load_model(weights, network)
        return network.eval()

    def quality(network: nn.Module, part: str) -> dict[str, float]:
        found = vars(task.evaluate(network, part))
        return {score: value for score, value in found.items() if value is not None}

    return Subject(
        name,
        model,
        evaluate=lambda network: quality(network, "test"),
        validate=lambda network: quality(network, "validation"),
        measure=task.measure,
        higher_is_better=task.measure not in FALLING,
        training_batches=task.training_batches,
        loss=task.loss,
        calibration_batches=task.calibration_batches,
        narrower=task.narrower,
        training_forward=task.forward,
        divergence=kl_divergence,
    )


def sized_batch(batch: Any, size: int) -> Any:
    """Return a batch of another size: its tensors cut or repeated along their first dimension.

    The first tensor tells the size of the batch; tensors whose first dimension differs from it stay as they are.

    Args:
        batch: A tensor, or tuples, lists and mappings of tensors and other values, which stay as they are.
        size: How many samples there are to be.

    Raises:
        ValueError: There is no tensor with a first dimension.

    Example:
        >>> x, y = sized_batch((torch.zeros(4, 3), torch.arange(4)), 6)
        >>> x.shape, y.tolist()
        (torch.Size([6, 3]), [0, 1, 2, 3, 0, 1])
    """
    present = batch_size(batch)

    def resize(part: Any) -> Any:
        if isinstance(part, Tensor):
            return _repeated(part, size) if part.dim() and len(part) == present else part
        if isinstance(part, Mapping):
            return {key: resize(value) for key, value in part.items()}
        return type(part)(map(resize, part)) if type(part) in (tuple, list) else part

    return resize(batch)


def batch_size(batch: Any) -> int:
    """Return the first dimension of the first tensor of a batch.

    Raises:
        ValueError: There is no such tensor.
    """
    parts = [batch]
    while parts:
        part = parts.pop(0)
        if isinstance(part, Tensor) and part.dim() and len(part):
            return len(part)
        if isinstance(part, Mapping | tuple | list):
            parts = [*(part.values() if isinstance(part, Mapping) else part), *parts]
    raise ValueError(f"a batch must hold a tensor with samples along its first dimension, got {type(batch).__name__}.")


def _repeated(tensor: Tensor, size: int) -> Tensor:
    times = -(-size // len(tensor))
    return torch.cat(times * [tensor])[:size] if times > 1 else tensor[:size]  # cat keeps the order in memory
