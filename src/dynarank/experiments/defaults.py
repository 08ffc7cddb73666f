"""The one place of default settings that depend on the data set, and how they complete a configuration."""

from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch

from dynarank.experiments.config import TrainConfig


@dataclass(frozen=True)
class DataDefaults:
    """Settings for one data set.

    Args:
        model: Network.
        hidden: Widths of mlp.
        epochs: Passes over the training data.
        batch_size: Samples per step.
        lr: Learning rate of the factors by integrator.
        other_lr: Learning rate of integrators that are not listed, in the convention of SGD.
        base_lr: Learning rate of Adam for everything that is not low-rank.
        rank_policy: Rank policy where neither a budget nor a tolerance is given.
        budget: Budget of the rank policy ``budget`` where none is given.
        budget_start: The budget at the beginning, as a multiple of the budget, where the network starts at low rank.
        dense_lrs: Learning rates of the dense networks (SGD with Nesterov momentum); validation chooses one.
        threads: Threads of torch on the CPU, where it has as many. More than these small networks can use make every
            step slower, and many times slower where other programs run as well.
    """

    model: str
    hidden: tuple[int, ...]
    epochs: int
    batch_size: int
    lr: Mapping[str, float]
    other_lr: float
    base_lr: float
    rank_policy: str
    budget: float
    budget_start: float
    dense_lrs: tuple[float, ...]
    threads: int


# Chosen by validation accuracy, several seeds each. On classification noise_edge does not find a balance: the learning
# rate decides whether no direction reaches the edge or nearly all do. With a planted rank it is exact.
DEFAULTS = {
    "digits": DataDefaults(
        model="mlp",
        hidden=(512, 512, 512),
        epochs=30,
        batch_size=32,
        lr={
            "gauge_fixed_muon": 0.04,
            "tangent_muon": 0.02,
            "lora_muon": 0.02,
            "tangent_adam": 0.01,
            "tangent_adam_elementwise": 0.03,
            "tangent_heavy_ball": 0.2,
            "riemannian_gradient": 0.2,
            "parallel_bug": 0.8,
            "augmented_bug": 0.8,
        },
        other_lr=0.1,
        base_lr=0.002,
        rank_policy="budget",
        budget=0.05,
        budget_start=3.0,
        dense_lrs=(0.05, 0.1),
        threads=1,
    ),
    "mnist": DataDefaults(
        model="lenet5",
        hidden=(500, 500, 500, 500),
        epochs=5,
        batch_size=128,
        lr={
            "gauge_fixed_muon": 0.05,
            "tangent_muon": 0.025,
            "tangent_heavy_ball": 0.1,
            "parallel_bug": 0.2,
            "augmented_bug": 0.2,
        },
        other_lr=0.05,
        base_lr=0.002,
        rank_policy="budget",
        budget=0.05,
        budget_start=3.0,
        dense_lrs=(0.05,),
        threads=2,
    ),
    "synthetic": DataDefaults(
        model="linear",
        hidden=(64,),
        epochs=20,
        batch_size=64,
        lr={"gauge_fixed_muon": 0.1, "tangent_muon": 0.05, "parallel_bug": 2.0, "augmented_bug": 2.0},
        other_lr=0.5,
        base_lr=0.002,
        rank_policy="noise_edge",
        budget=0.3,
        budget_start=1.0,
        dense_lrs=(0.5, 1.0),
        threads=1,
    ),
}


def complete(config: TrainConfig) -> TrainConfig:
    """Return the configuration with every None that has a default replaced by it.

    Example:
        >>> complete(TrainConfig()).model, complete(TrainConfig(tolerance=0.1)).rank_policy
        ('mlp', 'relative_tail')
    """
    defaults = DEFAULTS[config.data]
    policy = config.rank_policy or _rank_policy(config, defaults)
    model = config.model or defaults.model
    wants_budget = policy == "budget" and not any(option.startswith("fraction=") for option in config.rank_options)
    return replace(
        config,
        start="dense" if config.method == "oialr" else config.start,
        model=model,
        hidden=config.hidden or (defaults.hidden if model == "mlp" else None),
        rank_policy=policy,
        budget=config.budget or (defaults.budget if wants_budget else None),
        epochs=config.epochs or defaults.epochs,
        batch_size=config.batch_size or defaults.batch_size,
        lr=config.lr or defaults.lr.get(config.integrator, defaults.other_lr),
        base_lr=config.base_lr or defaults.base_lr,
        threads=config.threads or min(defaults.threads, torch.get_num_threads()),
        **_teacher(config),
    )


def _rank_policy(config: TrainConfig, defaults: DataDefaults) -> str:
    if config.budget is not None:
        return "budget"
    return defaults.rank_policy if config.tolerance is None else "relative_tail"


def _teacher(config: TrainConfig) -> dict[str, float]:
    if config.data != "synthetic":
        return {}
    return {
        "planted_rank": 4 if config.planted_rank is None else config.planted_rank,
        "noise": 0.1 if config.noise is None else config.noise,
    }
