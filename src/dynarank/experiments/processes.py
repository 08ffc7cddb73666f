"""The processes of one run: started by torchrun they share every batch, otherwise there is one."""

import gc
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
import torch.distributed as dist
import torch.distributed.nn  # imported after the group, its default arguments would hold the group for ever
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from dynarank.distributed import is_main_process, world


@dataclass(frozen=True)
class Processes:
    """The place of this process among all.

    Args:
        process: Index of this process.
        number: Number of processes.
        device: Where this process trains.
    """

    process: int
    number: int
    device: torch.device

    @property
    def is_main(self) -> bool:
        """Whether this is the process that writes files and reports progress."""
        return self.process == 0

    def wrap(self, model: nn.Module) -> nn.Module:
        """Return what to call in training: the model, in a wrapper that averages gradients where there are several."""
        return model if self.number == 1 else DistributedDataParallel(model)

    def total(self, numbers: Tensor) -> Tensor:
        """Return the sum over all processes, in float64; every process must ask at the same moment."""
        total = numbers.detach().to(torch.float64).to(self.device if self.device.type == "cuda" else "cpu")
        if self.number > 1:
            total = total.clone()
            dist.all_reduce(total)
        return total

    def settle(self) -> None:
        """Wait until the device has done what it was told, so that a clock tells the truth."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)


@contextmanager
def joined(device: str) -> Iterator[Processes]:
    """Join the other processes that torchrun has started, if any, and leave them afterwards.

    Args:
        device: Device of the run; ``cuda`` means one GPU for each process.

    Raises:
        ValueError: If the device is not there.
    """
    expected = int(os.environ.get("WORLD_SIZE", "1"))
    own = torch.device(device)
    _check_device(own)
    if own.type == "cuda" and own.index is None:
        own = torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")) % torch.cuda.device_count())
    starts = expected > 1 and not dist.is_initialized()
    if starts:
        dist.init_process_group("nccl" if own.type == "cuda" else "gloo")
    try:
        process = dist.get_rank() if world() > 1 else 0
        yield Processes(process, world(), own)
    finally:
        if starts:
            # A group ends with the last object that refers to it; threads of gloo may abort the interpreter at its end.
            gc.collect()
            dist.destroy_process_group()


def is_main() -> bool:
    """Whether this process reports and writes, also before and after a run."""
    return is_main_process() and int(os.environ.get("RANK", "0")) == 0


def _check_device(device: torch.device) -> None:
    if device.type == "cuda" and not torch.cuda.is_available():
        raise ValueError(f"device must be one that this machine has, got {device}: torch sees no GPU. Use cpu.")
    if device.type == "cuda" and device.index is not None and device.index >= torch.cuda.device_count():
        raise ValueError(f"device must be below cuda:{torch.cuda.device_count()}, got {device}.")
