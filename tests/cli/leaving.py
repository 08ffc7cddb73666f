"""Train with ``DistributedDataParallel`` inside ``joined`` and fail if a thread is left afterwards: run by torchrun."""

import sys
from pathlib import Path

import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from dynarank import LowRankOptimizer, factorize_
from dynarank.experiments.processes import joined


def threads() -> int:
    return len(list(Path("/proc/self/task").iterdir()))


def train() -> None:
    model = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 2))
    factorize_(model, rank=2)
    wrapped = DistributedDataParallel(model)
    optimizer = LowRankOptimizer(wrapped, lr=0.01)
    wrapped(torch.ones(3, 8)).sum().backward()
    optimizer.step()


if __name__ == "__main__":
    torch.set_num_threads(1)
    before = threads()
    with joined("cpu"):
        train()
        during = threads()
    sys.exit(f"threads: {before}, {during}, {threads()}" if during == before or threads() > before else 0)
