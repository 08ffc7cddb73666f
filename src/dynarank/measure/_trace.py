"""What every layer saw in one forward pass: how often it was called, with which shapes, on how many rows."""

from collections.abc import Mapping
from dataclasses import dataclass
from math import prod
from typing import Any

import torch
from torch import Tensor, nn

from dynarank.layers.base import AbstractLowRankLayer
from dynarank.measure._batches import run
from dynarank.measure._forward import Forward, call, evaluating, unfused, watching


@dataclass(frozen=True)
class Trace:
    """What one layer saw in one forward pass.

    Attributes:
        rows: How many input rows the weight matrix was multiplied by, over all calls: batch times positions; of a
            convolution, batch times output positions.
        calls: How often the layer was called.
        inputs: Shape of the input of each call.
        input_dtype: Type of the first input; None if the layer was not called.
        channels_last: Whether the first input had its channels innermost in memory.
    """

    rows: int
    calls: int
    inputs: tuple[tuple[int, ...], ...]
    input_dtype: torch.dtype | None = None
    channels_last: bool = False


def trace(
    model: nn.Module, modules: Mapping[str, nn.Module], batch: Any, *, forward: Forward = call
) -> dict[str, Trace]:
    """Return what each of ``modules`` sees while the model computes one batch in eval mode without gradients.

    A layer whose weight is used without a call, such as the output projection in ``nn.MultiheadAttention``, counts as
    not called: 0 rows, 0 calls.

    Args:
        model: The model; training flags are put back.
        modules: Layers by name: linear layers and convolutions, dense or low-rank. Any other module counts as linear,
            one row for each vector along the last dimension of its input.
        batch: What ``forward`` takes.
        forward: How a batch enters the model.

    Raises:
        ValueError: The batch does not fit the model.
        TypeError: A layer was called without a tensor, or ``call`` does not know the kind of the batch.

    Example:
        >>> net = nn.Sequential(nn.Conv2d(1, 4, 3), nn.Flatten(), nn.Linear(16, 2))
        >>> seen = trace(net, {"conv": net[0], "fc": net[2]}, torch.zeros(5, 1, 4, 4))
        >>> seen["conv"].rows, seen["fc"].rows, seen["conv"].inputs
        (20, 5, ((5, 1, 4, 4),))
    """
    seen: dict[str, Trace] = {name: Trace(0, 0, ()) for name in modules}

    def note(name: str, layer: nn.Module, x: Tensor, output: Any) -> None:
        before, shape = seen[name], tuple(x.shape)
        first = before.calls == 0
        seen[name] = Trace(
            before.rows + count_rows(layer, x, output),
            before.calls + 1,
            (*before.inputs, shape),
            x.dtype if first else before.input_dtype,
            _is_channels_last(x) if first else before.channels_last,
        )

    with evaluating(model), unfused(), watching(modules, note):
        run(forward, model, batch, 0)
    return seen


def spatial_dimensions(layer: nn.Module) -> int:
    """Return over how many dimensions a layer's kernel slides: 1 to 3 of a convolution, 0 of any other layer."""
    if isinstance(layer, AbstractLowRankLayer):
        return len(layer.weight_shape) - 2
    return len(layer.kernel_size) if isinstance(layer, nn.Conv1d | nn.Conv2d | nn.Conv3d) else 0


def count_rows(layer: nn.Module, x: Tensor, output: Any) -> int:
    """Return how many rows the weight matrix is multiplied by in the call that took ``x`` to ``output``."""
    dimensions = spatial_dimensions(layer)
    if dimensions == 0:
        return prod(x.shape[:-1])
    batch = output.shape[0] if output.dim() == dimensions + 2 else 1
    return batch * prod(output.shape[-dimensions:])


def _is_channels_last(x: Tensor) -> bool:
    formats = {4: torch.channels_last, 5: torch.channels_last_3d}
    return (
        x.dim() in formats
        and x.is_contiguous(memory_format=formats[x.dim()])
        and not x.is_contiguous()  # with one channel or one pixel both hold
    )
