"""Normalisation statistics that fit the compressed model."""

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from dynarank.measure import Forward, call, evaluating, run


@torch.no_grad()
def renew_statistics_(model: nn.Module, batches: Iterable[Any], *, forward: Forward = call) -> int:
    """Estimate the running statistics of all batch normalisation layers anew; everything else stays as it is.

    Truncated weights change means and variances, and batch normalisation in evaluation mode divides by those of the
    network before. Means over batches replace them; only normalisation layers are put into training mode meanwhile.

    Args:
        model: The model, changed in place.
        batches: Batches of training data.
        forward: How a batch goes through the model.

    Returns:
        The number of layers that were renewed: those that the model calls. If it has none, no batch is looked at.

    Raises:
        ValueError: There is no batch, or one does not fit or has a single value per channel. Nothing has changed.

    Example:
        >>> model = nn.Sequential(nn.BatchNorm1d(3))
        >>> renew_statistics_(model, [torch.ones(4, 3)]), model[0].running_mean.tolist()
        (1, [1.0, 1.0, 1.0])
    """
    layers = tracking_layers(model)
    if not layers:
        return 0
    before, count = _statistics(layers), 0
    try:
        with _averaging(model, layers):
            for count, batch in enumerate(batches, 1):
                run(forward, model, batch, count - 1)
        if count == 0:
            raise ValueError("renew_statistics_: batches holds no batch.")
    except BaseException:
        _put_back(before)
        raise
    idle = [layer for layer in layers if not layer.num_batches_tracked]
    _put_back({layer: before[layer] for layer in idle})
    return len(layers) - len(idle)


@torch.no_grad()
def rehearse(model: nn.Module, batches: Iterable[Any], *, forward: Forward = call) -> None:
    """Raise what `renew_statistics_` would raise; the model is left as it is.

    Raises:
        ValueError: As `renew_statistics_`.
    """
    before = _statistics(tracking_layers(model))
    try:
        renew_statistics_(model, batches, forward=forward)
    except ValueError as error:
        raise ValueError(f"{error}. Pass other batches, or renew_statistics=False.") from error
    finally:
        _put_back(before)


def tracking_layers(model: nn.Module) -> list[Any]:
    """Return the batch normalisation layers with running statistics."""
    kind = nn.modules.batchnorm._BatchNorm
    return [module for module in model.modules() if isinstance(module, kind) and module.track_running_stats]


@torch.no_grad()
def renew_where_better_(
    model: nn.Module, batches: Iterable[Any], divergence_now: Callable[[], float], *, forward: Forward = call
) -> bool:
    """Renew the statistics, and take it back unless the model's outputs come nearer to what they should be.

    Means over a few batches are noisier than the running means of a long training: after a small truncation the old
    statistics are the better ones.

    Args:
        model: The model, changed in place.
        batches: Batches of training data.
        divergence_now: Measures how far the model's outputs are from what they should be.
        forward: How a batch goes through the model.

    Returns:
        Whether the statistics are new.
    """
    layers = tracking_layers(model)
    if not layers:
        return False
    before = _statistics(layers)
    distance = divergence_now()
    renew_statistics_(model, batches, forward=forward)
    if divergence_now() < distance:
        return True
    _put_back(before)
    return False


def _statistics(layers: list[Any]) -> dict[Any, dict[str, Tensor]]:
    return {layer: {name: buffer.clone() for name, buffer in layer.named_buffers()} for layer in layers}


def _put_back(statistics: dict[Any, dict[str, Tensor]]) -> None:
    for layer, buffers in statistics.items():
        for name, buffer in layer.named_buffers():
            buffer.copy_(buffers[name])


@contextmanager
def _averaging(model: nn.Module, layers: list[Any]) -> Iterator[None]:
    momenta = [layer.momentum for layer in layers]
    with evaluating(model):
        try:
            for layer in layers:
                layer.reset_running_stats()
                layer.momentum = None  # torch's sign for the plain mean over all batches
                layer.train()
            yield
        finally:
            for layer, momentum in zip(layers, momenta, strict=True):
                layer.momentum = momentum
