"""What networks cost that do the same: numbers, bytes, operations, memory, and time measured in turn."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from torch import nn

from dynarank.experiments.subject import Subject, sized_batch
from dynarank.factorize import deployed_parameters
from dynarank.measure import Timing, flops, latency, peak_memory, stored_bytes


@dataclass(frozen=True)
class Costs:
    """What a network costs.

    Args:
        parameters: Numbers in the deployed state dict.
        bytes: Bytes of parameters and buffers.
        flops: Operations of a forward pass of the smallest batch size, or None without an example batch.
        memory: Most bytes alive at once in a forward pass of the largest batch size, or None.
        latency: Time of a forward pass at each batch size.
    """

    parameters: int
    bytes: int
    flops: int | None = None
    memory: int | None = None
    latency: Mapping[int, Timing] = field(default_factory=dict)


def measure_costs(
    subject: Subject, networks: Mapping[str, nn.Module], batch_sizes: Sequence[int], *, seconds: float
) -> dict[str, Costs]:
    """Return what each network costs; the times of all of them are taken in turn.

    Args:
        subject: Whose example batch they compute; without one there are only sizes.
        networks: Networks by name.
        batch_sizes: Batch sizes to measure times at; none for no times.
        seconds: About how long to measure at each of them.
    """
    example = subject.example() if batch_sizes else None
    if example is None:
        return {name: Costs(deployed_parameters(model), stored_bytes(model)) for name, model in networks.items()}
    batches = {size: sized_batch(example, size) for size in sorted(batch_sizes)}
    smallest, largest = batches[min(batches)], batches[max(batches)]
    timings = {
        size: latency(networks, batch, forward=subject.forward, seconds=seconds) for size, batch in batches.items()
    }
    return {
        name: Costs(
            deployed_parameters(model),
            stored_bytes(model),
            flops(model, smallest, forward=subject.forward),
            peak_memory(model, largest, forward=subject.forward),
            {size: timing[name] for size, timing in timings.items()},
        )
        for name, model in networks.items()
    }
