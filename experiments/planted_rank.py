"""Planted ranks found by the default policy: pure noise, rank 3 and rank 8, at three noise levels, from three starts.

    python experiments/planted_rank.py

A linear teacher 64 -> 48 of exact rank with unit signal variance per output, 4,096 samples, Gaussian noise on the
targets; the student is one low-rank layer, trained for 20 epochs of 128 samples with the optimizer's defaults. Rank 0
is a teacher without signal; a layer keeps at least rank 1.
"""

from pathlib import Path

import torch
from torch.nn import functional

from dynarank import LowRankOptimizer, Periodic, factorize_
from dynarank.data import Batches, planted_teacher
from dynarank.experiments.loop import scheduled
from dynarank.models import LinearNetwork

RESULTS = Path(__file__).parent / "results"
PLANTED, NOISE, STARTS, SEEDS = (0, 3, 8), (0.1, 0.5, 1.0), (2, 5, 20), range(3)


def found(planted: int, noise: float, start: int, seed: int) -> int:
    """Return the rank of the student after training."""
    splits = planted_teacher(planted, noise=noise, seed=seed).splits
    torch.manual_seed(seed)
    model = LinearNetwork(64, 48)
    factorize_(model, rank=start, include_head=True)
    batches = Batches(splits.train_inputs, splits.train_targets, 128, torch.Generator().manual_seed(seed))
    steps = 20 * batches.steps_per_epoch
    optimizer = LowRankOptimizer(model, lr=0.05, schedule=Periodic(every=25, freeze=steps // 2))
    scheduler = scheduled(optimizer, steps=steps)
    for _ in range(steps):
        inputs, targets = batches.next_batch()
        optimizer.zero_grad()
        functional.mse_loss(model(inputs), targets).backward()
        optimizer.step()
        scheduler.step()
    return model.fc.rank


def main() -> None:
    """Train every student and write the table."""
    torch.set_num_threads(1)
    header = " | ".join(f"from rank {start}" for start in STARTS)
    lines = [f"| planted | noise | {header} | within one |", "|---|---|---|---|---|---|"]
    for planted in PLANTED:
        for noise in NOISE:
            ranks = [[found(planted, noise, start, seed) for seed in SEEDS] for start in STARTS]
            good = all(abs(rank - planted) <= 1 for row in ranks for rank in row)
            cells = " | ".join(", ".join(map(str, row)) for row in ranks)
            lines.append(f"| {planted} | {noise:g} | {cells} | {'yes' if good else 'no'} |")
            print(lines[-1], flush=True)
    head = f"# Planted ranks\n\n`python experiments/planted_rank.py`, seeds {SEEDS.start}-{SEEDS.stop - 1} a cell\n\n"
    (RESULTS / "planted_rank.md").write_text(
        head + "\n".join(lines) + f"\n\n{__doc__.split(chr(10) * 2, 2)[2].strip()}\n"
    )


if __name__ == "__main__":
    main()
