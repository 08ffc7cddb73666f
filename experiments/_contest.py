"""What the accuracy tables share: one run per process, dense networks with tuned learning rates, paired differences."""

import json
import math
import statistics
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import _jobs
import torch

from dynarank.data import Batches
from dynarank.errors import NonFiniteGradientError
from dynarank.experiments import TrainConfig, train
from dynarank.experiments.defaults import complete
from dynarank.experiments.loop import learning_rate
from dynarank.experiments.muon import Muon
from dynarank.experiments.problem import Problem

RESULTS = Path(__file__).parent / "results"
TUNING_SEED = 100
T975 = {1: 12.71, 2: 4.303, 3: 3.182, 4: 2.776, 5: 2.571, 9: 2.262}  # Student's t, by degrees of freedom


@dataclass(frozen=True)
class Run:
    """One training run.

    Args:
        name: Row of the table.
        seed: Seed of the initial weights and of the batches.
        lr: Largest learning rate.
        config: Options of `TrainConfig`.
        dense: Optimizer of a dense network, ``"sgd"`` or ``"muon"``; empty for a low-rank run.
        parameters: Size of a narrower dense network; 0 for the full one.
    """

    name: str
    seed: int
    lr: float
    config: tuple[tuple[str, Any], ...]
    dense: str = ""
    parameters: int = 0

    def key(self) -> str:
        """Return what tells this run from every other."""
        return json.dumps(asdict(self), sort_keys=True)


def execute(run: Run) -> dict[str, Any]:
    """Train one network and return its accuracies at the last step."""
    torch.set_num_threads(1)
    config = TrainConfig(**dict(run.config), seed=run.seed, threads=1, compare=False)
    return _dense(run, config) if run.dense else _low_rank(run, config)


def _low_rank(run: Run, config: TrainConfig) -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as folder:
        try:
            outcome = train(TrainConfig(**{**asdict(config), "lr": run.lr, "out": folder}))
        except NonFiniteGradientError as error:  # a learning rate too large: the worst result there is
            return {"test_accuracy": 0.0, "validation_accuracy": 0.0, "diverged": str(error)}
    names = ("test_accuracy", "validation_accuracy", "parameters", "dense_parameters", "ranks", "seconds", "steps")
    return {name: outcome[name] for name in names}


def _dense(run: Run, config: TrainConfig) -> dict[str, Any]:
    """Train a dense network on the same batches with the same shape of learning rates."""
    problem = Problem.load(complete(config))
    whole = problem.build()
    model = problem.build_narrower(run.parameters) if run.parameters else whole
    batches = Batches(
        problem.splits.train_inputs,
        problem.splits.train_targets,
        problem.config.batch_size,
        torch.Generator().manual_seed(run.seed),
    )
    steps = batches.steps_per_epoch * problem.config.epochs
    optimizers = _optimizers(run, model)
    rates = [group["lr"] for one in optimizers for group in one.param_groups]
    for step in range(steps):
        for group, lr in zip((g for one in optimizers for g in one.param_groups), rates, strict=True):
            group["lr"] = lr * learning_rate(step, steps=steps)
        inputs, targets = batches.next_batch()
        model.zero_grad()
        problem.loss(model(inputs), targets).backward()
        for one in optimizers:
            one.step()
    return {
        "test_accuracy": problem.evaluate(model, "test").accuracy,
        "validation_accuracy": problem.evaluate(model, "validation").accuracy,
        "parameters": sum(p.numel() for p in model.parameters()),
        "dense_parameters": sum(p.numel() for p in whole.parameters()),
    }


def _optimizers(run: Run, model: torch.nn.Module) -> list[torch.optim.Optimizer]:
    if run.dense == "sgd":
        return [torch.optim.SGD(model.parameters(), lr=run.lr, momentum=0.9, nesterov=True)]
    matrices = [p for name, p in model.named_parameters() if p.ndim > 1 and not name.startswith("head")]
    chosen = {id(p) for p in matrices}
    rest = [p for p in model.parameters() if id(p) not in chosen]
    return [Muon(matrices, lr=run.lr), torch.optim.Adam(rest, lr=2e-3, betas=(0.9, 0.99))]


def perform(runs: Sequence[Run], store: Path, *, workers: int) -> dict[str, dict[str, Any]]:
    """Carry out the runs that ``store`` does not hold yet, a process each, and return all results by key."""
    return _jobs.perform(runs, store, script=__file__, workers=workers)


def tuned(rows: Sequence[tuple[Run, ...]], lrs: Sequence[float], store: Path, *, workers: int) -> list[float]:
    """Return for each group of runs the learning rate with the best validation accuracy on the tuning seed."""
    trials = [
        [[Run(**{**asdict(r), "seed": TUNING_SEED, "lr": lr, "config": r.config}) for r in group] for lr in lrs]
        for group in rows
    ]
    results = perform([run for group in trials for at in group for run in at], store, workers=workers)
    best = []
    for group in trials:
        scores = [statistics.mean(results[r.key()]["validation_accuracy"] for r in at) for at in group]
        best.append(lrs[scores.index(max(scores))])
    return best


def interval(values: Sequence[float]) -> str:
    """Return the mean of percentages with its 95 % interval (Student's t)."""
    mean = statistics.mean(values)
    if len(values) < 2:
        return f"{mean:+.2f}"
    half = T975[len(values) - 1] * statistics.stdev(values) / math.sqrt(len(values))
    return f"{mean:+.2f} ± {half:.2f}"


def row_of(results: Sequence[dict[str, Any]], rivals: Sequence[Sequence[dict[str, Any]]]) -> str:
    """Return a row of the table: accuracy, size, ranks and the paired differences to the rivals.

    Runs that diverged are counted in the name and left out of the figures.
    """
    lost = sum("diverged" in r for r in results)
    name = results[0]["name"] + (f" ({lost} of {len(results)} diverged)" if lost else "")
    pairs = [[(a, b) for a, b in zip(results, other, strict=True) if "diverged" not in a] for other in rivals]
    rivals_differ = [other is not results for other in rivals]
    results = [r for r in results if "diverged" not in r]
    tests = [100 * r["test_accuracy"] for r in results]
    removed = [100 * (1 - r["parameters"] / r["dense_parameters"]) for r in results]
    ranks = " / ".join(sorted({",".join(map(str, r["ranks"].values())) for r in results if "ranks" in r})) or "-"
    spread = f" ± {statistics.stdev(tests):.2f}" if len(tests) > 1 else ""
    cells = [
        name,
        f"{results[0]['lr']:g}",
        f"{statistics.mean(tests):.2f}{spread}",
        f"{min(tests):.2f}",
        f"{statistics.mean(r['parameters'] for r in results):,.0f}",
        f"{min(removed):.2f}",
        *(
            interval([100 * (a["test_accuracy"] - b["test_accuracy"]) for a, b in both]) if differs else "-"
            for both, differs in zip(pairs, rivals_differ, strict=True)
        ),
        ranks,
    ]
    return f"| {' | '.join(cells)} |"


if __name__ == "__main__":
    given = json.loads(sys.argv[sys.argv.index("--job") + 1])
    given["config"] = tuple(
        (name, tuple(value) if isinstance(value, list) else value) for name, value in given["config"]
    )
    print(json.dumps(execute(Run(**given))))
