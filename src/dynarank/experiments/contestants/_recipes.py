"""What several contestants share: the task's own recipe, AdamW, Muon, and networks of a given size."""

import copy
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from dynarank.experiments.muon import Muon
from dynarank.experiments.tasks.base import AbstractTask
from dynarank.factorize import deployed_parameters, factorize_
from dynarank.layers.base import low_rank_layers

PRECISION = 0.002  # of the size of a narrower network
MUON_LR = 0.05  # per unit of spectral norm; what ResNet-20 is trained with


def own_recipe(task: AbstractTask, model: nn.Module, *, factor: float) -> list[torch.optim.Optimizer]:
    """Return the optimizers of the task with all their learning rates times a factor."""
    optimizers = task.optimizers(model)
    for group in (group for optimizer in optimizers for group in optimizer.param_groups):
        group["lr"] *= factor
    return optimizers


def adamw(task: AbstractTask, model: nn.Module, *, lr: float) -> list[torch.optim.Optimizer]:
    """Return AdamW on all parameters, with the options of the task."""
    return [torch.optim.AdamW(model.parameters(), **{**task.adamw, "lr": lr})]


def muon(task: AbstractTask, model: nn.Module, *, lr: float, weight_decay: float) -> list[torch.optim.Optimizer]:
    """Return Muon on the weights that `factorize_` would factorise, and the task's AdamW on everything else."""
    names = matrices(model)
    weights = [model.get_submodule(name).weight for name in names]
    chosen = {id(weight) for weight in weights}
    rest = [p for p in model.parameters() if id(p) not in chosen]
    own: torch.optim.Optimizer = Muon(weights, lr=lr, weight_decay=weight_decay)  # type: ignore[arg-type]
    return [own, torch.optim.AdamW(rest, **task.adamw)] if rest else [own]


def muon_options(task: AbstractTask, model: nn.Module, *, lr: float, weight_decay: float) -> dict[str, Any]:
    """Return the options of `MuonAdamW` for weights that `factorize_` would factorise, or for cores that are there."""
    cores = [layer.S for layer in low_rank_layers(model).values() if layer.S is not None]
    weights = [model.get_submodule(name).weight for name in matrices(model)] if not low_rank_layers(model) else cores
    return {"matrices": weights, "muon": {"lr": lr, "weight_decay": weight_decay}, "adamw": task.adamw}


def matrices(model: nn.Module) -> dict[str, tuple[int, int]]:
    """Return the shape ``(m, n)`` of each weight that `factorize_` would factorise; the model is left as it is.

    Example:
        >>> matrices(nn.Sequential(nn.Linear(30, 20), nn.ReLU(), nn.Linear(20, 10)))
        {'0': (20, 30)}
    """
    report = factorize_(copy.deepcopy(model), rank=1, keep_dense_above_break_even=False)
    return {entry.name: entry.shape for entry in report.factorized if entry.shape is not None}


def narrower(task: AbstractTask, parameters: int) -> nn.Module:
    """Return the narrowest network of the task that stores at least ``parameters``, freshly initialised.

    It is found to a fifth of a percent. Tasks offer networks of at most so many parameters, often in coarse steps; one
    that stores less than the network it is compared with would be no fair rival.

    Raises:
        ValueError: The task has no such network below the dense one.
    """
    with torch.random.fork_rng(devices=[]):
        whole = deployed_parameters(task.model())
        found = {whole: whole}  # stored parameters by what was asked for

        def stored(allowed: int) -> int:
            try:
                found[allowed] = deployed_parameters(task.narrower(allowed))
            except ValueError:  # no network is so small
                found[allowed] = 0
            return found[allowed]

        low, high = parameters, whole - 1
        if low > high or stored(high) < parameters:
            _refuse(found, parameters, whole)
        if stored(low) < parameters:
            while high - low > max(1, PRECISION * parameters):
                middle = (low + high) // 2
                low, high = (low, middle) if stored(middle) >= parameters else (middle, high)
        else:
            high = low
    return task.narrower(high)


def _refuse(found: Mapping[int, int], parameters: int, whole: int) -> None:
    largest = max((stored for allowed, stored in found.items() if allowed < whole), default=0)
    offer = f"the largest it offers has {largest:,}" if largest else "it offers none"
    raise ValueError(
        f"there is no narrower network of at least {parameters:,} and fewer than {whole:,} parameters: {offer}. Leave "
        "out the narrower networks, or choose another size."
    )
