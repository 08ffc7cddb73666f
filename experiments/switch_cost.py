"""What the switch costs: full rank first, low rank from a step on, beside the same run that stays dense.

    python experiments/switch_cost.py --workers 2

LeNet5 on MNIST and the small GPT on Shakespeare are trained by the AdamW of their task, with warm-up and cosine decay
planned for 600 steps. In step 300, after the update, every layer but the head becomes low-rank at full rank: as a
trained core between bases that stay (OIALR), with the optimizer's state of the core fresh or transported, or with bases
that an integrator moves, at its typical learning rate. Up to there the runs are one; afterwards batches, their order
and the schedule are the same. All losses are in float32 on one held-out batch, 2,000 images or 64 sequences. One thread
a run.
"""

import argparse
import copy
import json
import math
import statistics
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from _contest import RESULTS
from _jobs import publish
from torch import nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR

from dynarank import LowRankOptimizer
from dynarank._discovery import resolve
from dynarank.data import random_blocks
from dynarank.dense_start.dense_start import DenseStart
from dynarank.experiments.loop import scheduled
from dynarank.experiments.tasks.base import AbstractTask
from dynarank.experiments.tasks.gpt_small import SmallGPTTask
from dynarank.experiments.tasks.lenet5 import LeNet5Task
from dynarank.integrators.base import AbstractIntegrator
from dynarank.measure import call
from dynarank.ranks.fixed import Fixed
from dynarank.switches.at_step import AtStep

SWITCH, LATER, SEEDS = 300, (16, 100), range(5)
STORE = RESULTS / "switch_cost.jsonl"
# Student's t that one in twenty exceeds, by the number of values.
STUDENT = {2: 6.314, 3: 2.920, 4: 2.353, 5: 2.132, 6: 2.015, 7: 1.943, 8: 1.895, 9: 1.860, 10: 1.833}
DENSE = "stays dense"
CORES = {"bases stay, state fresh": "fresh", "bases stay, state transported": "transported"}
# tangent_muon takes too long for fc1 of LeNet5: of rank 500 its step is one of rank 1,000.
MOVING = {f"bases move, {name}": name for name in ("tangent_heavy_ball", "tangent_muon")}


@dataclass(frozen=True)
class Setting:
    """A task and the ways to go on.

    Args:
        title: Its name in the table.
        task: Network and data.
        held_out: What the batch is on which all losses are.
        ways: Names of the ways to go on.
    """

    title: str
    task: type[AbstractTask]
    held_out: Callable[[Any], Any]
    ways: tuple[str, ...]


def images(task: LeNet5Task) -> Any:
    """Return 2,000 images that nothing is trained on."""
    return tuple(part[:2000] for part in task.splits.part("validation"))


def sequences(task: SmallGPTTask) -> Any:
    """Return 64 sequences that nothing is trained on."""
    generator = torch.Generator().manual_seed(0)
    return random_blocks(task.text.validation, task.sizes["context"], 64, generator)


SETTINGS = {
    "lenet5": Setting("LeNet5", LeNet5Task, images, (DENSE, *CORES, "bases move, tangent_heavy_ball")),
    "gpt_small": Setting("small GPT", SmallGPTTask, sequences, (DENSE, *CORES, *MOVING)),
}


@dataclass(frozen=True)
class Job:
    """One run up to the switch and every way to go on.

    Args:
        task: Name of the setting.
        seed: Of weights and batches.
        switch: Step after whose update layers become low-rank; half of what is planned.
        later: How many steps later losses are taken.
    """

    task: str
    seed: int
    switch: int
    later: Sequence[int]


@dataclass(frozen=True)
class Run:
    """A network in training with all that moves it."""

    task: AbstractTask
    model: nn.Module
    optimizer: Optimizer
    scheduler: LambdaLR

    def take(self, batches: Iterable[Any]) -> None:
        """Take a step on every batch."""
        self.model.train()
        for batch in batches:
            self.optimizer.zero_grad()
            self.task.loss(self.task.forward(self.model, batch), batch).backward()
            self.optimizer.step()
            self.scheduler.step()

    @torch.no_grad()
    def loss(self, batch: Any) -> float:
        """Return the loss on a batch, in full precision."""
        return float(self.task.loss(call(self.model.eval(), batch), batch))


def execute(job: Job) -> dict[str, Any]:
    """Train up to the switch, and on in every way; return the losses of each."""
    torch.set_num_threads(1)
    torch.manual_seed(job.seed)
    setting = SETTINGS[job.task]
    task = setting.task()
    batches, model = task.training_batches(job.seed), task.model()
    optimizer = torch.optim.AdamW(model.parameters(), **task.adamw)
    run = Run(task, model, optimizer, scheduled(optimizer, steps=2 * job.switch))
    run.take(next(batches) for _ in range(job.switch - 1))
    rest = [next(batches) for _ in range(1 + max(job.later))]
    held_out = setting.held_out(task)
    return {"found": {way: go_on(run, way, rest, held_out, job) for way in setting.ways}}


def go_on(run: Run, way: str, batches: list[Any], held_out: Any, job: Job) -> dict[str, float]:
    """Take the step of the switch and all later ones on a copy; return losses before and after it, and later."""
    own, before = branch(run, way, offset=job.switch - 1), []
    # Called before what makes layers low-rank, in the same step.
    handle = own.optimizer.register_step_post_hook(lambda *given: before.append(own.loss(held_out)))
    start = None if way == DENSE else low_rank_after_a_step(own, state=CORES.get(way, "fresh"))
    own.take(batches[:1])
    handle.remove()
    if start is not None and (start.dense or any(layer.rank < layer.max_rank for layer in start.low_rank.values())):
        raise RuntimeError(f"{way}: not every layer has become low-rank at full rank.")
    found = {"before": before[0], "after": own.loss(held_out)}
    for begin, end in zip((0, *job.later), job.later, strict=False):
        own.take(batches[1 + begin : 1 + end])
        found[f"later {end}"] = own.loss(held_out)
    return found


def low_rank_after_a_step(run: Run, *, state: Any) -> DenseStart:
    """Let every layer but the head become low-rank at full rank in the next step."""
    return DenseStart(run.model, run.optimizer, switch=AtStep(1), rank_policy=Fixed(), keep_dense=False, state=state)


def branch(run: Run, way: str, *, offset: int) -> Run:
    """Return a copy of a run after ``offset`` steps, with the optimizer that a way to go on takes."""
    model = copy.deepcopy(run.model)
    optimizer: Optimizer = torch.optim.AdamW(model.parameters(), **run.task.adamw)
    if way in MOVING:
        integrator: Any = resolve("integrator", "dynarank.integrators", AbstractIntegrator, MOVING[way])
        optimizer = LowRankOptimizer(
            model,
            lr=integrator.typical_lr,
            integrator=integrator,
            rank_policy=Fixed(),
            base=torch.optim.AdamW,
            base_options=run.task.adamw,
            dense_start=True,
        )
    for own, old in zip(model.parameters(), run.model.parameters(), strict=True):
        optimizer.state[own] = copy.deepcopy(run.optimizer.state[old])
    scheduler = scheduled(optimizer, steps=2 * (offset + 1), offset=offset)
    return Run(run.task, model, optimizer, scheduler)


def page(rows: list[dict[str, Any]]) -> str:
    """Return the table as Markdown."""
    times = list(rows[0]["later"])
    columns = [f"{time} steps later: {what}" for time in times for what in ("loss", "difference", "at most")]
    header = ["task", "after the switch", "loss", "at once, relative", *columns]
    lines = [f"| {' | '.join(header)} |", "|---" * len(header) + "|"]
    for name, setting in SETTINGS.items():
        own = [row["found"] for row in rows if row["task"] == name]
        for way in setting.ways:
            lines.append(f"| {setting.title} | {way} | {' | '.join(cells_of(own, way, times))} |")
    _, command, text = (__doc__ or "").split("\n\n", 2)
    note = (
        f"Means over {len({row['seed'] for row in rows})} seeds. At once: the largest relative change of the loss by "
        "the switch itself, of any seed. A difference is to the run that stays dense, of the same seed; it is below "
        '"at most" with 95 % confidence (one-sided, Student\'s t).'
    )
    head = f"# Switching to low rank: what it costs\n\n`{command.strip()}`\n\n{text}\n{note}"
    return "\n\n".join([head, "\n".join(lines)]) + "\n"


def cells_of(found: list[dict[str, dict[str, float]]], way: str, times: Iterable[int]) -> list[str]:
    """Return a row of the table; each of ``found`` is a seed."""
    if any(seed[way]["before"] != seed[DENSE]["before"] for seed in found):
        raise RuntimeError(f"{way}: up to the switch it is not the run that stays dense.")
    jump = max(abs(seed[way]["after"] / seed[way]["before"] - 1) for seed in found)
    cells = [f"{statistics.mean(seed[way]['before'] for seed in found):.4f}", "-" if way == DENSE else f"{jump:.1e}"]
    for time in times:
        losses = [seed[way][f"later {time}"] for seed in found]
        gaps = [loss - seed[DENSE][f"later {time}"] for loss, seed in zip(losses, found, strict=True)]
        gap = ["-", "-"] if way == DENSE else [f"{statistics.mean(gaps):+.4f}", f"{upper_bound(gaps):+.4f}"]
        cells += [f"{statistics.mean(losses):.4f}", *gap]
    return cells


def upper_bound(values: list[float]) -> float:
    """Return what the mean is below with 95 % confidence; infinity for a single value."""
    if len(values) == 1:
        return math.inf
    return statistics.mean(values) + STUDENT[len(values)] * statistics.stdev(values) / math.sqrt(len(values))


def main() -> None:
    """Carry out what is missing and write the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--workers", type=int, default=2, help="processes at a time")
    parser.add_argument("--seeds", type=int, default=len(SEEDS), choices=range(1, 11), help="how many")
    parser.add_argument("--steps", type=int, help="before the switch, and two after, to try it out: nothing is written")
    parser.add_argument("--job", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.job:
        print(json.dumps(execute(Job(**json.loads(options.job)))))
        return
    later = (1, 2) if options.steps else LATER
    jobs = [Job(name, seed, options.steps or SWITCH, later) for seed in range(options.seeds) for name in SETTINGS]
    publish(jobs, page, STORE, script=__file__, workers=options.workers, trial=bool(options.steps))


if __name__ == "__main__":
    main()
