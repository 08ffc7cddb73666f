"""Time of a forward pass in inference: of whole models against each other, and of single layers."""

from collections import Counter
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from dynarank.measure._batches import copied
from dynarank.measure._forward import Forward, call, evaluating
from dynarank.measure._timing import Timing, interleaved
from dynarank.measure._trace import Trace


def latency(
    models: Mapping[str, nn.Module],
    batch: Any,
    *,
    forward: Forward = call,
    seconds: float = 1.0,
    rounds: int | None = None,
) -> dict[str, Timing]:
    """Return the time of one forward pass of each model in eval mode and inference mode, measured in turn.

    Args:
        models: Models by name; training flags are put back. One model under two names shows the noise.
        batch: What ``forward`` takes; the same for all models.
        forward: How a batch enters a model.
        seconds: About how long to measure in all.
        rounds: Number of rounds, instead of ``seconds``.

    Raises:
        ValueError: There are no models, or a number is out of range.

    Example:
        >>> timings = latency({"wide": nn.Linear(64, 64), "again": nn.Linear(64, 64)}, torch.zeros(2, 64), rounds=3)
        >>> timings["wide"].rounds
        3
    """
    batch = copied(batch)
    with evaluating(*models.values()):
        for model in models.values():
            # Tensors a model keeps from its first call, such as tables of positions, could not be trained with later
            # if they were made in inference mode.
            forward(model, batch)
        with torch.inference_mode():
            calls = {name: partial(forward, model, batch) for name, model in models.items()}
            return interleaved(calls, seconds=seconds, rounds=rounds)


def layer_latency(
    layers: Mapping[str, nn.Module],
    trace: Trace,
    *,
    dtype: torch.dtype,
    device: torch.device | str,
    seconds: float = 0.2,
) -> dict[str, Timing]:
    """Return the time each layer takes for all calls of a trace together, on random inputs of the traced shapes.

    Alternatives for one layer are compared this way: the dense layer and its low-rank twins of several ranks. Inputs
    that stay in the cache make it less than the layer's share in the model.

    Args:
        layers: Layers by name that take the traced inputs, already of that dtype and on that device.
        trace: What the layer to be replaced saw.
        dtype: Type of the random inputs.
        device: Where to make them.
        seconds: About how long to measure in all.

    Raises:
        ValueError: The trace has no calls, or there are no layers.

    Example:
        >>> seen = Trace(rows=6, calls=2, inputs=((2, 8), (4, 8)))
        >>> timings = layer_latency({"fc": nn.Linear(8, 3)}, seen, dtype=torch.float32, device="cpu", seconds=0)
        >>> timings["fc"].rounds
        5
    """
    if not trace.inputs:
        raise ValueError("layer_latency needs a trace with at least one call, got none: the layer was never called.")
    samples = _samples(trace, dtype, device)
    with evaluating(*layers.values()), torch.inference_mode():
        return interleaved({name: _run_all(layer, samples) for name, layer in layers.items()}, seconds=seconds)


def _run_all(layer: nn.Module, samples: list[Tensor]) -> Callable[[], None]:
    def run() -> None:
        for x in samples:
            layer(x)

    return run


def _samples(trace: Trace, dtype: torch.dtype, device: torch.device | str) -> list[Tensor]:
    """Return an input for each call; calls with inputs of one shape get the same tensor."""
    generator = torch.Generator().manual_seed(0)
    formats = {4: torch.channels_last, 5: torch.channels_last_3d} if trace.channels_last else {}
    samples = []
    for shape, calls in Counter(trace.inputs).items():
        draw = torch.randn(shape, generator=generator).to(device=device, dtype=dtype)
        samples += calls * [draw.contiguous(memory_format=formats.get(len(shape), torch.contiguous_format))]
    return samples
