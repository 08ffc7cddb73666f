"""How the default integrator was chosen: accuracy on LeNet5, and the time of a step on wide layers.

    python experiments/integrators.py --workers 3

Accuracy: three epochs of MNIST at 95 % removed from rank 2, every layer factorised, the learning rate of each method
tuned among five on validation images with one extra seed. Time: an MLP 784-2048-2048-2048-10, batch 256, fixed rank,
methods interleaved in one process, CPU time against dense with an A/A pair.
"""

import argparse
from collections.abc import Callable
from dataclasses import asdict

import torch
from _contest import RESULTS, Run, perform, row_of, tuned
from step_time import measure, stepper, table

from dynarank import LowRankOptimizer, factorize_
from dynarank._discovery import discover
from dynarank.integrators.base import AbstractIntegrator
from dynarank.models import MLP
from dynarank.ranks.fixed import Fixed

SEEDS = range(3)
LRS = (0.02, 0.05, 0.1, 0.2, 0.4)
SHARED = (
    ("data", "mnist"),
    ("model", "lenet5"),
    ("epochs", 3),
    ("batch_size", 128),
    ("include_head", True),
    ("freeze", 0.4),
    ("every", 50),
    ("rank_options", ("growth=0.5",)),
    ("budget", 0.05),
)


def accuracy(names: list[str], workers: int) -> str:
    """Return the table of accuracies, each method with its own learning rate."""
    store = RESULTS / "integrators.jsonl"
    rows = [Run(name, 0, 0.0, (*SHARED, ("integrator", name))) for name in names]
    best = tuned([(run,) for run in rows], LRS, store, workers=workers)
    chosen = [
        [Run(**{**asdict(run), "seed": seed, "lr": lr, "config": run.config}) for seed in SEEDS]
        for run, lr in zip(rows, best, strict=True)
    ]
    results = perform([run for row in chosen for run in row], store, workers=workers)
    found = {row[0].name: [results[run.key()] for run in row] for row in chosen}
    lines = [
        "| integrator | lr | test % (mean ± sd) | worst | parameters | removed % | against tangent_muon | ranks |",
        "|---|---|---|---|---|---|---|---|",
    ]
    return "\n".join([*lines, *(row_of(own, [found["tangent_muon"]]) for own in found.values())])


def wide(rank: int | None, name: str = "") -> Callable[[], None]:
    """Return one step of the wide network: dense with SGD, or factorised at ``rank`` with an integrator."""
    model = MLP(784, (2048, 2048, 2048), 10)
    shape = (256, 784)
    if rank is None:
        return stepper(model, torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9, nesterov=True), shape)
    factorize_(model, rank=rank)
    options = {"lr": 1e-3, "integrator": name, "rank_policy": Fixed()}
    base = {"lr": 0.01, "momentum": 0.9}
    return stepper(model, LowRankOptimizer(model, base=torch.optim.SGD, base_options=base, **options), shape)


def times(names: list[str], rounds: int) -> str:
    """Return the table of step times on the wide network."""
    torch.set_num_threads(1)
    steps = {"dense": wide(None), "dense again (A/A)": wide(None)}
    steps |= {f"{name}, rank {rank}": wide(rank, name) for rank in (16, 64, 160, 320) for name in names}
    return table(measure(steps, rounds))


def main() -> None:
    """Measure both and write the page."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--workers", type=int, default=2)
    arguments = parser.parse_args()
    names = list(discover("dynarank.integrators", AbstractIntegrator))
    first, second = accuracy(names, arguments.workers), times(names, 11)
    text = f"## Accuracy\n\n{first}\n\n## Time of a step on wide layers\n\n{second}"
    note = __doc__.split("\n\n", 2)[2].strip()
    head = f"# Integrators\n\n`python experiments/integrators.py`, seeds {SEEDS.start}-{SEEDS.stop - 1}"
    (RESULTS / "integrators.md").write_text(f"{head}\n\n{note}\n\n{text}\n")
    print(text)


if __name__ == "__main__":
    main()
