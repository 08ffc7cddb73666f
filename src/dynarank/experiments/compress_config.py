"""What ``dynarank compress`` does: its options as data."""

from dataclasses import dataclass
from typing import final

from dynarank.compress.budgets import MEASURES
from dynarank.compress.compress import METHODS
from dynarank.errors import unknown_name
from dynarank.experiments.subject import Subject


@final
@dataclass(frozen=True)
class CompressConfig:
    """Settings of a compression and of what it is compared with.

    Args:
        budget: How much of the measure there may be: up to 1 as a fraction, above 1 in its own unit.
        tolerate: Instead of a budget: what may be lost before recovery, of an accuracy the difference, such as 0.01, of
            a loss the part by which it may grow. The smallest size within it is searched for.
        measure: What the budget counts: parameters, bytes, flops or latency (measured here).
        method: How layers are truncated: activation_aware or svd. Default: the first where there is calibration data.
        forms: Forms that layers may take; all by default.
        rank_multiple: Ranks are multiples of it, where a layer has room for two of them.
        include_head: Whether the classifier head is compressed too.
        faster_only: Whether layers that would get slower stay as they are.
        recover: Steps of training after truncation; 0 for none.
        distil: Whether that training also follows the outputs of the network as given.
        lr: Largest learning rate of the factors in recovery, in the convention of the integrator.
        integrator: How weights move along the manifold in recovery.
        only: What recovery trains: core for the small cores between frozen bases, or names of layers; all by default.
        student: Whether a narrower dense network of equal size is trained for the same number of steps.
        batch_sizes: Batch sizes to measure times at.
        seconds: About how long to measure at each batch size.
        seed: Seed of the training batches and of the student.

    Raises:
        ValueError: A value is out of range or unknown, or options contradict each other.

    Example:
        >>> CompressConfig(budget=0.5).measure
        'parameters'
        >>> CompressConfig(budget=0.5, tolerate=0.01)
        Traceback (most recent call last):
        ValueError: give either a budget or what is tolerated, got budget 0.5 and tolerate 0.01.
    """

    budget: float | None = None
    tolerate: float | None = None
    measure: str = "parameters"
    method: str | None = None
    forms: tuple[str, ...] | None = None
    rank_multiple: int = 1
    include_head: bool = False
    faster_only: bool = False
    recover: int = 0
    distil: bool = False
    lr: float | None = None
    integrator: str | None = None
    only: tuple[str, ...] | None = None
    student: bool = False
    batch_sizes: tuple[int, ...] = (1, 32)
    seconds: float = 2.0
    seed: int = 0

    def __post_init__(self) -> None:
        if (self.budget is None) == (self.tolerate is None):
            got = "neither" if self.budget is None else f"budget {self.budget} and tolerate {self.tolerate}"
            raise ValueError(f"give either a budget or what is tolerated, got {got}.")
        if self.measure not in MEASURES:
            raise unknown_name("measure", self.measure, MEASURES)
        if self.method is not None and self.method not in METHODS:
            raise unknown_name("method", self.method, METHODS)
        for name, least in (("recover", 0), ("rank_multiple", 1), ("seconds", 0), ("seed", 0)):
            if not getattr(self, name) >= least:
                raise ValueError(f"{name} must be at least {least}, got {getattr(self, name)}.")
        if any(size < 1 for size in self.batch_sizes):
            raise ValueError(f"batch_sizes must be at least 1, got {self.batch_sizes}.")
        if self.lr is not None and not self.lr > 0:
            raise ValueError(f"lr must be above 0, got {self.lr}.")
        wanting = [name for name in ("distil", "student", "lr", "integrator", "only") if getattr(self, name)]
        if wanting and not self.recover:
            raise ValueError(f"{wanting[0]} belongs to recovery. Give the number of steps with recover.")

    def check(self, subject: Subject) -> None:
        """Refuse what the subject lacks the functions for.

        Raises:
            ValueError: Something is asked for that cannot be done.
        """
        if self.tolerate is not None and subject.evaluate is None and subject.validate is None:
            raise subject.lacks("evaluate(model)", "tolerate")
        if self.recover and subject.training_batches is None:
            raise subject.lacks("training_batches(seed)", "recover")
        if self.recover and subject.loss is None and not self.distil:
            raise subject.lacks("loss(outputs, batch)", "recover without distil")
        if self.student and subject.narrower is None:
            raise subject.lacks("narrower(parameters)", "student")
