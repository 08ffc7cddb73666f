"""What a training run does: the options of ``dynarank train`` as data."""

import math
import shlex
from dataclasses import dataclass, fields
from typing import Any, Literal, final

import torch

from dynarank import data, models
from dynarank.errors import unknown_name

STARTS = ("low", "dense")
METHODS = ("dlrt", "oialr")


@final
@dataclass(frozen=True)
class TrainConfig:
    """Settings of a training run. None stands for what `dynarank.experiments.defaults` has for the data set.

    Args:
        data: Data set: digits (of scikit-learn, needs no network), mnist, or synthetic (a teacher of planted rank).
        data_dir: Folder with the files of mnist; without it the usual folders are searched, then it is downloaded.
        model: Network: mlp, lenet5 or linear.
        hidden: Widths of the hidden layers of mlp.
        method: dlrt, low-rank training on the manifold, or oialr, full rank for --warmup-steps and then cores between
            bases that stay, whose ranks are cut every --every steps. The latter has Adam for everything.
        integrator: How a weight moves along the manifold; `dynarank methods` lists the names.
        integrator_options: Options of the integrator, each as key=value.
        rank_policy: How ranks are chosen; `dynarank methods` lists the names. Default: budget where a budget is given,
            relative_tail where a tolerance is given. That of the paper of --method oialr is sigma_cutoff.
        rank_options: Options of the rank policy, each as key=value.
        budget: Parameters allowed, as a fraction of the dense network's; every tensor counts.
        tolerance: Part of a layer's spectrum that may be discarded, for rank policies with a tolerance.
        start: Start at a low rank and grow, or dense: train dense for a while, factorise at full rank, and shrink.
        start_rank: Rank of every layer at the start, for --start low.
        warmup_steps: Steps of dense training, for --start dense and --method oialr.
        planted_rank: Rank of the teacher, for synthetic data.
        noise: Standard deviation of the noise on the targets, where the signal has 1, for synthetic data.
        epochs: Passes over the training data.
        batch_size: Samples per step, over all processes together.
        lr: Largest learning rate of the factors, in the convention of the integrator.
        base_lr: Largest learning rate of everything that is not low-rank (Adam).
        freeze: Part of the run after which ranks stay as they are.
        every: Steps between rank events.
        include_head: Whether the last layer is factorised too.
        seed: Seed of the initial weights, of the order of the batches, and of synthetic data.
        device: Device to train on, such as cpu or cuda.
        threads: Threads of torch on the CPU.
        out: Folder of the run. Default: runs/<data>-<model>-<number>.
        compare: Whether the dense network, and a narrower dense one of equal size, are trained afterwards.

    Raises:
        ValueError: If a value is out of range or a name is unknown, or if options contradict each other.

    Example:
        >>> TrainConfig(data="synthetic", planted_rank=5).epochs is None
        True
        >>> TrainConfig(epochs=0)
        Traceback (most recent call last):
        ValueError: epochs must be at least 1, got 0.
    """

    data: str = "digits"
    data_dir: str | None = None
    model: str | None = None
    hidden: tuple[int, ...] | None = None
    method: Literal["dlrt", "oialr"] = "dlrt"
    integrator: str = "gauge_fixed_muon"
    integrator_options: tuple[str, ...] = ()
    rank_policy: str | None = None
    rank_options: tuple[str, ...] = ()
    budget: float | None = None
    tolerance: float | None = None
    start: Literal["low", "dense"] = "low"
    start_rank: int = 2
    warmup_steps: int = 100
    planted_rank: int | None = None
    noise: float | None = None
    epochs: int | None = None
    batch_size: int | None = None
    lr: float | None = None
    base_lr: float | None = None
    freeze: float = 0.5
    every: int = 25
    include_head: bool = False
    seed: int = 0
    device: str = "cpu"
    threads: int | None = None
    out: str | None = None
    compare: bool = True

    def __post_init__(self) -> None:
        self._check_names()
        for name in ("start_rank", "warmup_steps", "epochs", "batch_size", "every", "threads"):
            self._check_range(name, least=1)
        for name in ("planted_rank", "noise", "seed"):
            self._check_range(name, least=0)
        for name in ("lr", "base_lr"):
            self._check_range(name, above=0)
        self._check_range("freeze", above=0, most=1)
        for name in ("budget", "tolerance"):
            self._check_range(name, above=0, below=1)
        self._check_combinations()

    def _check_names(self) -> None:
        if self.data not in data.NAMES:
            raise unknown_name("data set", self.data, data.NAMES)
        if self.model is not None and self.model not in models.NAMES:
            raise unknown_name("model", self.model, models.NAMES)
        if self.method not in METHODS:
            raise unknown_name("method", self.method, METHODS)
        if self.start not in STARTS:
            raise unknown_name("start", self.start, STARTS)
        try:
            torch.device(self.device)
        except RuntimeError:
            raise ValueError(f"device must be one of torch's, such as cpu or cuda:0, got {self.device!r}.") from None

    def _check_range(
        self,
        name: str,
        *,
        least: float | None = None,
        above: float | None = None,
        most: float | None = None,
        below: float | None = None,
    ) -> None:
        value = getattr(self, name)
        if value is None:
            return
        bounds = {"at least": least, "above": above, "at most": most, "below": below}
        fits = (least is None or value >= least) and (above is None or value > above)
        fits = fits and (most is None or value <= most) and (below is None or value < below)
        if not fits or not math.isfinite(value):
            allowed = " and ".join(f"{word} {bound}" for word, bound in bounds.items() if bound is not None)
            raise ValueError(f"{name} must be {allowed}, got {value}.")

    def _check_combinations(self) -> None:
        for name in ("planted_rank", "noise"):
            if getattr(self, name) is not None and self.data != "synthetic":
                raise ValueError(f"{name} belongs to data = synthetic, got data = {self.data}. Leave it out.")
        if self.hidden is not None and self.model not in (None, "mlp"):
            raise ValueError(f"hidden belongs to model = mlp, got model = {self.model}. Leave it out.")
        if self.hidden is not None and (not self.hidden or min(self.hidden) < 1):
            raise ValueError(f"hidden must be one or more widths of at least 1, got {self.hidden}.")
        if self.budget is not None and self.tolerance is not None and self.rank_policy is None:
            raise ValueError("budget and tolerance belong to different rank policies, got both. Leave one out.")


def as_command(config: TrainConfig) -> str:
    """Return the command line that starts a run with these settings.

    Example:
        >>> as_command(TrainConfig(epochs=3, compare=False))
        'dynarank train --epochs 3 --no-compare'
    """
    words = ["dynarank", "train"]
    for field in fields(config):
        value = getattr(config, field.name)
        if value != field.default:
            words += _flag(field.name.replace("_", "-"), value)
    return shlex.join(words)


def _flag(name: str, value: Any) -> list[str]:
    if isinstance(value, bool):
        return [f"--{name}" if value else f"--no-{name}"]
    return [f"--{name}", *map(str, value if isinstance(value, tuple) else (value,))]
