"""Dense and low-rank networks of a run, each with its optimizer and learning rates."""

import torch
from torch import nn

from dynarank.dense_start.dense_start import DenseStart
from dynarank.dense_start.oialr import oialr
from dynarank.experiments import methods
from dynarank.experiments.config import TrainConfig
from dynarank.experiments.loop import Trainee, scheduled
from dynarank.experiments.moments import Moments
from dynarank.experiments.processes import Processes
from dynarank.factorize import FactorizationReport, deployed_parameters, factorize_
from dynarank.layers._factored import AbstractFactoredLayer, factored_layers
from dynarank.optim.low_rank_optimizer import LowRankOptimizer
from dynarank.ranks.base import AbstractRankPolicy, LayerSpectrum, PlanContext
from dynarank.schedules.periodic import Periodic

BETAS = (0.9, 0.99)  # of Adam


def factorise_(model: nn.Module, config: TrainConfig) -> FactorizationReport:
    """Factorise a dense network in place, at the rank at which the configuration starts."""
    rank = "full" if config.start == "dense" else config.start_rank
    # A single matrix counts as the head.
    return factorize_(model, rank=rank, include_head=config.include_head or config.model == "linear")


def low_rank_trainee(model: nn.Module, config: TrainConfig, moments: Moments, processes: Processes) -> Trainee:
    """Return a factorised network with the optimizer of the configuration."""
    forward = processes.wrap(model)
    optimizer = LowRankOptimizer(
        forward,
        lr=config.lr or 0.0,
        integrator=methods.integrator(config),
        rank_policy=methods.rank_policy(config, freeze_step=moments.adaptive_steps),
        schedule=Periodic(config.every, freeze=moments.adaptive_steps),
        base=torch.optim.Adam,
        base_options={"lr": config.base_lr, "betas": BETAS},
    )
    return Trainee(model, forward, optimizer, scheduled(optimizer, steps=moments.steps, offset=moments.offset))


def oialr_trainee(
    model: nn.Module, config: TrainConfig, moments: Moments, processes: Processes
) -> tuple[Trainee, DenseStart]:
    """Return a dense network with Adam, and what makes it low-rank on the way."""
    trainee = warming_trainee(model, config, moments, processes)
    policy = methods.rank_policy(config, freeze_step=moments.adaptive_steps)
    start = oialr(
        trainee.forward,
        trainee.optimizer,
        delay=config.warmup_steps,
        every=config.every,
        rank_policy=policy,
        steps=moments.steps,
        include_head=config.include_head or config.model == "linear",
    )
    return trainee, start


def warming_trainee(model: nn.Module, config: TrainConfig, moments: Moments, processes: Processes) -> Trainee:
    """Return the dense network of a dense start with Adam."""
    optimizer = torch.optim.Adam(model.parameters(), lr=config.base_lr or 0.0, betas=BETAS)
    return Trainee(model, processes.wrap(model), optimizer, scheduled(optimizer, steps=moments.steps))


def dense_trainee(model: nn.Module, *, lr: float, steps: int, processes: Processes) -> Trainee:
    """Return a dense network to compare with: gradient descent with Nesterov momentum."""
    optimizer = torch.optim.SGD(model.parameters(), lr=lr, momentum=0.9, nesterov=True)
    return Trainee(model, processes.wrap(model), optimizer, scheduled(optimizer, steps=steps))


def check_plan(model: nn.Module, policy: AbstractRankPolicy, *, step: int) -> None:
    """Ask a rank policy for the plan of a later step, so that a budget that cannot be met is refused before training.

    Raises:
        ValueError: As the policy says.
    """
    layers = factored_layers(model)
    others = deployed_parameters(model) - sum(layer.deployed_parameters() for layer in layers.values())
    dense = others + sum(layer.dense_parameters for layer in layers.values())
    policy.plan([s for name, layer in layers.items() for s in _grown(name, layer)], PlanContext(step, dense, others))


def _grown(name: str, layer: AbstractFactoredLayer) -> list[LayerSpectrum]:
    """Return what a policy may see of a layer later: by then it may have grown to any rank."""
    shapes = [layer.matrix_shape, *(mode.shape for mode in layer.modes().values())]
    every = zip(layer.ranks_by_name(name), shapes, layer.prices(layer.all_ranks), strict=True)
    return [
        LayerSpectrum(own, torch.linspace(1.0, 0.5, min(shape), dtype=torch.float64), shape, price=price)
        for own, shape, price in every
    ]
