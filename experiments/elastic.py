"""One training for every rank: an elastic network at an eighth, a quarter, a half and all of its ranks.

    python experiments/elastic.py --workers 2

Each size stands beside a network trained for it alone, with these ranks from the start, the same steps, batches and
learning rate. An elastic step is one gradient of a mean: the loss at full rank, and at a random fraction of the ranks
the mean of loss and distance to the outputs at full rank. The last column: the network of all ranks, not elastic,
truncated. Ranks of LeNet5 on MNIST: 16, 32, 64, without the head, three epochs; of the small GPT on Shakespeare: 32
everywhere but in the head. tangent_muon at its default learning rate with cosine decay, AdamW for everything else, one
thread a run.
"""

import argparse
import copy
import json
import statistics
from dataclasses import dataclass
from typing import Any

import torch
from _contest import RESULTS
from _jobs import publish
from torch import Tensor, nn

from dynarank import LowRankOptimizer, factorize_
from dynarank.compress import SoftTargets
from dynarank.elastic import Elastic, Fractions, set_rank_
from dynarank.experiments.loop import scheduled
from dynarank.experiments.tasks.base import AbstractTask
from dynarank.experiments.tasks.gpt_small import SmallGPTTask
from dynarank.experiments.tasks.lenet5 import LeNet5Task
from dynarank.factorize import deployed_parameters

FRACTIONS, SEEDS = (0.125, 0.25, 0.5, 1.0), range(3)
STORE = RESULTS / "elastic.jsonl"


@dataclass(frozen=True)
class Setting:
    """A task and how long it is trained.

    Args:
        title: Its name in the table.
        task: Network and data.
        ranks: Full rank of every layer that is factorised, by the end of its name.
        steps: Optimizer steps.
    """

    title: str
    task: type[AbstractTask]
    ranks: dict[str, int]
    steps: int


MATRICES = ("query", "key", "value", "out", "up", "down")
SETTINGS = {
    "lenet5": Setting("LeNet5, accuracy in %", LeNet5Task, {"conv1": 16, "conv2": 32, "fc1": 64}, 3 * 430),
    "gpt_small": Setting("small GPT, loss", SmallGPTTask, dict.fromkeys(MATRICES, 32), 1000),
}


@dataclass(frozen=True)
class Job:
    """One training: elastic, or for one fraction of the ranks alone."""

    task: str
    elastic: bool
    fraction: float
    seed: int
    steps: int


def execute(job: Job) -> dict[str, Any]:
    """Train a network and return how well it does on test data at every fraction that it can be cut to."""
    torch.set_num_threads(1)
    torch.manual_seed(job.seed)
    task = SETTINGS[job.task].task()
    model = start(job)
    train(model, task, job)
    found = {}
    for fraction in FRACTIONS if job.fraction == 1 else (1.0,):
        small = copy.deepcopy(model)
        set_rank_(small, fraction)
        quality = task.evaluate(small.eval(), "test")
        value = quality.loss if task.measure == "loss" else 100 * (quality.accuracy or 0.0)
        found[str(job.fraction * fraction)] = {"value": value, "parameters": deployed_parameters(small)}
    return {"found": found}


def start(job: Job) -> nn.Module:
    """Return the network at a fraction of the full ranks, which are the truncated SVD of torch's initialisation."""
    setting = SETTINGS[job.task]
    model = setting.task().model()
    part = {name: round(job.fraction * rank) for name, rank in setting.ranks.items()}
    factorize_(model, rank=1, rank_pattern=part, keep_dense_above_break_even=False)
    return model


def train(model: nn.Module, task: AbstractTask, job: Job) -> None:
    """Train a network, with all of its ranks or elastically."""
    optimizer = LowRankOptimizer(
        model, integrator="tangent_muon", rank_policy="fixed", base=torch.optim.AdamW, base_options=task.adamw
    )
    scheduler = scheduled(optimizer, steps=job.steps)
    elastic = Elastic(model, Fractions(FRACTIONS[:-1]), imitate=SoftTargets(1.0))
    generator, batches = torch.Generator().manual_seed(job.seed), task.training_batches(job.seed)
    model.train()
    for _ in range(job.steps):
        batch = next(batches)

        def forward(batch: Any = batch) -> Tensor:
            return task.forward(model, batch)

        def criterion(outputs: Tensor, batch: Any = batch) -> Tensor:
            return task.loss(outputs, batch)

        optimizer.zero_grad()
        loss = elastic.loss(forward, criterion, generator) if job.elastic else criterion(forward())
        loss.backward()
        optimizer.step()
        scheduler.step()


def page(rows: list[dict[str, Any]]) -> str:
    """Return the table as Markdown."""
    header = ("task", "ranks", "parameters", "elastic", "trained for it alone", "difference", "not elastic, truncated")
    lines = [f"| {' | '.join(header)} |", "|---" * len(header) + "|"]
    for name, setting in SETTINGS.items():
        own = [row for row in rows if row["task"] == name]
        seeds = sorted({row["seed"] for row in own})
        for fraction in FRACTIONS:
            elastic, whole, alone = (
                [value_of(own, seed, fraction, elastic=e, trained=t) for seed in seeds]
                for e, t in ((True, 1.0), (False, 1.0), (False, fraction))
            )
            size = next(row["found"][str(fraction)]["parameters"] for row in own if row["elastic"])
            gap = statistics.mean(elastic) - statistics.mean(alone)
            gain = f"{100 * gap / statistics.mean(alone):+.2f} %" if setting.task.measure == "loss" else f"{gap:+.2f}"
            cells = [setting.title, f"{fraction:.1%}", f"{size:,}", *map(spread, (elastic, alone)), gain, spread(whole)]
            lines.append(f"| {' | '.join(cells)} |")
    _, command, text = (__doc__ or "").split("\n\n", 2)
    seeds = max(row["seed"] for row in rows)
    note = f"Mean ± standard deviation over seeds 0 to {seeds} on test data; a difference of losses is in percent."
    head = f"# One training for every rank\n\n`{command.strip()}`\n\n{text}\n{note}"
    return "\n\n".join([head, "\n".join(lines)]) + "\n"


def value_of(rows: list[dict[str, Any]], seed: int, fraction: float, *, elastic: bool, trained: float) -> float:
    """Return how well the network that was trained at a fraction of the ranks does at this one."""
    chosen = (seed, elastic, trained)
    (row,) = (row for row in rows if (row["seed"], row["elastic"], row["fraction"]) == chosen)
    return row["found"][str(fraction)]["value"]


def spread(values: list[float]) -> str:
    """Return mean and standard deviation."""
    deviation = f" ± {statistics.stdev(values):.3f}" if len(values) > 1 else ""
    return f"{statistics.mean(values):.3f}{deviation}"


def main() -> None:
    """Carry out what is missing and write the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--workers", type=int, default=2, help="processes at a time")
    parser.add_argument("--seeds", type=int, default=len(SEEDS), help="how many")
    parser.add_argument("--steps", type=int, help="of every run, to try it out: nothing is written")
    parser.add_argument("--job", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.job:
        print(json.dumps(execute(Job(**json.loads(options.job)))))
        return
    runs = [(False, fraction) for fraction in FRACTIONS] + [(True, 1.0)]
    jobs = [
        Job(name, elastic, fraction, seed, options.steps or setting.steps)
        for seed in SEEDS[: options.seeds]
        for name, setting in SETTINGS.items()
        for elastic, fraction in runs
    ]
    publish(jobs, page, STORE, script=__file__, workers=options.workers, trial=bool(options.steps))


if __name__ == "__main__":
    main()
