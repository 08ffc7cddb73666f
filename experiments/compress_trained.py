"""Accuracy against size for trained networks: truncated, recovered, and beside narrower networks from scratch.

    dynarank pretrain resnet20 --out runs/trained/resnet20-0     # and gpt, lenet5: the networks to compress
    python experiments/compress_trained.py resnet20 --trained runs/trained --jobs 4

Every size has plain truncation of the weights (singular value decomposition, one relative tail for all layers), with
and without renewed normalisation statistics; activation-aware truncation; and the latter recovered with three seeds by
fine-tuning and by distillation, both for the same time, a fifth of that of the training. Beside them stands a narrower
network from scratch that trained as long as the trained network and the recovery together. One thread a process.
"""

import argparse
import copy
import json
import statistics
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from _jobs import key_of, perform

from dynarank.checkpoint import load_model
from dynarank.compress import Compressor, SoftTargets, kl_divergence, recover_, renew_statistics_
from dynarank.experiments.pretraining import pretrain
from dynarank.experiments.tasks import TASKS
from dynarank.factorize import deployed_parameters
from dynarank.measure import flops

RESULTS = Path(__file__).parent / "results"
SIZES, SEEDS = (0.75, 0.5, 0.33, 0.25), (0, 1, 2)
TITLES = {
    "resnet20": "ResNet-20 on CIFAR-10",
    "gpt": "character-level GPT on tiny Shakespeare",
    "lenet5": "LeNet5 on MNIST",
}
# By task: largest learning rates of the factors and of the rest, part of the training time, batch size, how it is
# distilled, and what differs where at least half of the parameters stay: there is less to get back, and more to lose.
RECIPES: dict[str, dict[str, Any]] = {
    "resnet20": {"lr": 0.01, "base": 1e-3, "share": 0.2, "batch": 128, "temperature": 4.0, "labels": False},
    "gpt": {"lr": 0.01, "base": 1e-3, "share": 0.1, "batch": 32, "temperature": 2.0, "labels": True},
    "lenet5": {"lr": 0.01, "base": 1e-3, "share": 0.1, "batch": 128, "temperature": 2.0, "labels": True},
}
GENTLE: dict[str, dict[str, Any]] = {"resnet20": {"lr": 0.0025, "base": 5e-4}}
TRAINING_BATCH = {"resnet20": 256, "gpt": 32, "lenet5": 128}
# Processor time of a training step of the narrower network of each size, relative to the whole one: what --step-times
# prints, medians of seven.
STEP_TIME = {
    "resnet20": {0.75: 1.036, 0.5: 0.859, 0.33: 0.715, 0.25: 0.598},
    "gpt": {0.75: 0.980, 0.5: 0.914, 0.33: 0.840, 0.25: 0.800},
    "lenet5": {0.75: 0.982, 0.5: 0.959, 0.33: 0.920, 0.25: 0.804},
}
TRUNCATIONS = {
    "svd": {"method": "svd", "forms": ["matrix"], "measured_sensitivity": False},
    "aware": {"divergence": kl_divergence},
}


@dataclass(frozen=True)
class Job:
    """One row of the results.

    Args:
        task: Name of the task.
        size: Part of the parameters that is left.
        start: ``"trained"``, ``"svd"``, ``"aware"`` or ``"scratch"``.
        recovery: ``"none"``, ``"renewed"`` (normalisation statistics only), ``"tuned"`` or ``"distilled"``.
        seed: Seed of the batches of the recovery, or of the network from scratch.
    """

    task: str
    size: float
    start: str
    recovery: str
    seed: int = 0


def execute(job: Job, trained: Path) -> dict[str, Any]:
    """Carry out a job and return what it found."""
    task = TASKS[job.task]()
    began = time.process_time()
    found: dict[str, Any] = {}
    if job.start == "trained":
        model = load_trained(task, job.task, trained)
    elif job.start == "scratch":
        model = scratch(task, job)
    else:
        model = torch.load(truncated_file(trained, job), weights_only=False)
        if job.recovery == "renewed":
            renew_statistics_(model, task.calibration_batches())
        elif job.recovery != "none":
            recover(task, model, load_trained(task, job.task, trained), job, found)
    return found | judged(task, model) | {"cpu_seconds": round(time.process_time() - began, 1)}


def judged(task: Any, model: torch.nn.Module) -> dict[str, Any]:
    """Return how well a network does and what it costs."""
    quality = {part: vars(task.evaluate(model, part)) for part in ("validation", "test")}
    return quality | {"parameters": deployed_parameters(model), "flops": flops(model, task.calibration_batches()[0])}


def load_trained(task: Any, name: str, trained: Path) -> torch.nn.Module:
    """Return the trained network."""
    model = task.model()
    load_model(trained / f"{name}-0", model)
    return model.eval()


def truncated_file(trained: Path, job: Job) -> Path:
    """Return where the truncated network of a job is kept."""
    return trained / "truncated" / f"{job.task}-{job.start}-{job.size:g}.pt"


def truncate(name: str, start: str, trained: Path) -> None:
    """Truncate a trained network to all sizes, keep the results, and print what became of the layers."""
    task = TASKS[name]()
    model = load_trained(task, name, trained)
    compressor = Compressor(model, calibration=task.calibration_batches(), **TRUNCATIONS[start])
    for size in SIZES:
        smaller = copy.deepcopy(model)
        report = compressor.apply_(
            compressor.plan(size), model=smaller, renew_statistics=False if start == "svd" else None
        )
        file = truncated_file(trained, Job(name, size, start, "none"))
        file.parent.mkdir(parents=True, exist_ok=True)
        torch.save(smaller, file)
        print(f"{start} to {size:.0%}\n{report}\n{task.evaluate(smaller)}", flush=True)


def scratch(task: Any, job: Job) -> torch.nn.Module:
    """Train a narrower network for as long as the whole one and a recovery of a fifth of that take together."""
    steps = round(1.2 * task.training_steps / STEP_TIME[job.task][job.size])
    return pretrain(task, seed=job.seed, steps=steps, parameters=int(job.size * deployed_parameters(task.model())))


def step_times(name: str) -> dict[float, float]:
    """Return the processor time of a training step of the narrower networks, relative to the whole one."""
    task = TASKS[name]()
    whole, batch = task.model(), next(iter(task.training_batches(0)))
    models = {1.0: whole} | {size: task.narrower(int(size * deployed_parameters(whole))) for size in SIZES}
    optimizers = {size: task.optimizers(model) for size, model in models.items()}
    seconds: dict[float, list[float]] = {size: [] for size in models}
    for _ in range(9):  # the first two warm up
        for size, model in models.items():
            began = time.process_time()
            model.zero_grad()
            task.loss(task.forward(model, batch), batch).backward()
            for optimizer in optimizers[size]:
                optimizer.step()
            seconds[size].append(time.process_time() - began)
    medians = {size: statistics.median(times[2:]) for size, times in seconds.items()}
    return {size: round(median / medians[1.0], 3) for size, median in medians.items()}


def recover(task: Any, model: torch.nn.Module, dense: torch.nn.Module, job: Job, found: dict[str, Any]) -> None:
    """Fine-tune or distil in place for a share of the training time."""
    recipe = RECIPES[job.task] | (GENTLE.get(job.task, {}) if job.size >= 0.5 else {})
    distilled = job.recovery == "distilled"
    teacher = {"teacher": dense, "distance": SoftTargets(recipe["temperature"])} if distilled else {}
    samples = recipe["share"] * task.training_steps * TRAINING_BATCH[job.task]
    # A step of distillation runs the dense network forward as well: about a quarter longer in all three tasks.
    steps = round(samples / recipe["batch"] * (0.8 if distilled else 1.0))
    outcome = recover_(
        model,
        task.training_batches(1000 + job.seed, batch_size=recipe["batch"]),
        task.loss if recipe["labels"] or not distilled else None,
        steps=steps,
        lr=recipe["lr"],
        base_options={"lr": recipe["base"]},
        forward=task.forward,
        tell=lambda step, steps, loss: print(f"step {step} of {steps}: {loss:.4f}", file=sys.stderr, flush=True),
        **teacher,
    )
    found |= {"steps": steps, "batch": recipe["batch"], "lr": recipe["lr"]}
    found |= {"seconds": round(outcome.seconds, 1), "last_loss": outcome.last_loss}


def jobs_of(task: str) -> list[Job]:
    """Return all jobs of a table, those of the smallest sizes last."""
    found = [Job(task, 1.0, "trained", "none")]
    for size in SIZES:
        found += [
            Job(task, size, "svd", "none"),
            Job(task, size, "svd", "renewed"),
            Job(task, size, "aware", "none"),
        ]
        for recovery in ("tuned", "distilled"):
            found += [Job(task, size, "aware", recovery, seed) for seed in SEEDS]
        found.append(Job(task, size, "scratch", "none"))
    return found


COLUMNS = {
    "plain SVD": ("svd", "none"),
    "plain SVD, statistics renewed": ("svd", "renewed"),
    "activation-aware": ("aware", "none"),
    "then fine-tuned": ("aware", "tuned"),
    "then distilled": ("aware", "distilled"),
    "narrower, from scratch": ("scratch", "none"),
}


def table(task: str, results: list[dict[str, Any]], dense: dict[str, Any]) -> str:
    """Return the table of one task as Markdown."""
    lines = [f"| size | parameters | FLOPs | {' | '.join(COLUMNS)} |", "|---" * (3 + len(COLUMNS)) + "|"]
    for size in SIZES:
        cells = [cell(task, [r for r in results if of(r) == (size, *column)]) for column in COLUMNS.values()]
        aware = next(r for r in results if of(r) == (size, "aware", "none"))
        share = f"{aware['parameters'] / dense['parameters']:.1%} | {aware['flops'] / dense['flops']:.1%}"
        lines.append(f"| {size:.0%} | {share} | {' | '.join(cells)} |")
    return "\n".join(lines)


def cell(task: str, rows: list[dict[str, Any]]) -> str:
    """Return mean and standard deviation of the measure on the test part."""
    measure = TASKS[task].measure
    scale, digits = (100, 2) if measure == "accuracy" else (1, 3)
    values = [scale * row["test"][measure] for row in rows]
    spread = f" ± {statistics.stdev(values):.{digits}f}" if len(values) > 1 else ""
    return f"{statistics.mean(values):.{digits}f}{spread}" if values else "-"


def page(task: str, results: list[dict[str, Any]], dense: dict[str, Any]) -> str:
    """Return the whole page."""
    measure = TASKS[task].measure
    what = "Test accuracy in percent" if measure == "accuracy" else "Test loss (cross-entropy per character)"
    value = f"{100 * dense['test'][measure]:.2f}" if measure == "accuracy" else f"{dense['test'][measure]:.3f}"
    damages = [
        f"{size:.0%}: " + " to ".join(f"{damage(task, results, dense, size, start):.4g}" for start in TRUNCATIONS)
        for size in SIZES
    ]
    tuned = [r for r in results if r["recovery"] in ("tuned", "distilled")]
    recipes = {f"{r['recovery']}: {r['steps']} steps of {r['batch']} samples at {r['lr']:g}" for r in tuned}
    return f"""# Compressing a trained {TITLES[task]}

`python experiments/compress_trained.py {task}`, after `dynarank pretrain {task}`. {what}; mean and standard deviation
where there are several seeds. **As trained: {value}**, with {dense["parameters"]:,} parameters.

{table(task, results, dense)}

Damage before any recovery, plain SVD to activation-aware: {"; ".join(damages)}.

{verdict(task, results)}

Recovery, with the largest learning rate of the factors: {"; ".join(sorted(recipes))}. The training took
{TASKS[task].training_steps} steps of {TRAINING_BATCH[task]}. Fine-tuning and distillation take about the same time. The
narrower network was trained from scratch for 1.2 times the processor time of the training, with the settings of the
whole one, which were not tuned for it.
"""


def verdict(task: str, results: list[dict[str, Any]]) -> str:
    """Return at which sizes the narrower network from scratch is better than the recovered ones."""
    measure = TASKS[task].measure
    sign = 1 if measure == "accuracy" else -1
    wins = []
    for size in SIZES:
        means = {
            column: statistics.mean(values)
            for column in (("aware", "tuned"), ("aware", "distilled"), ("scratch", "none"))
            if (values := [sign * r["test"][measure] for r in results if of(r) == (size, *column)])
        }
        narrower = means.pop(("scratch", "none"), None)
        if narrower is not None and means and narrower > max(means.values()):
            wins.append(f"{size:.0%}")
    return f"The narrower network is better than both recovered ones at: {', '.join(wins) or 'no size'}."


def of(row: dict[str, Any]) -> tuple[float, str, str]:
    """Return the cell of the table that a row belongs to."""
    return row["size"], row["start"], row["recovery"]


def damage(task: str, results: list[dict[str, Any]], dense: dict[str, Any], size: float, start: str) -> float:
    """Return what truncation alone costs, in points of accuracy or in loss."""
    measure = TASKS[task].measure
    row = next(r for r in results if of(r) == (size, start, "none"))
    lost = dense["test"][measure] - row["test"][measure]
    return 100 * lost if measure == "accuracy" else -lost


def main() -> None:
    """Carry out what is missing and write the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("task", choices=sorted(TASKS))
    parser.add_argument("--trained", type=Path, default=Path("runs/trained"), help="folder of the trained networks")
    parser.add_argument("--jobs", type=int, default=2, help="processes at a time")
    parser.add_argument("--truncate", choices=sorted(TRUNCATIONS), help="truncate to all sizes, and stop")
    parser.add_argument("--step-times", action="store_true", help="print the times that STEP_TIME holds, and stop")
    parser.add_argument("--job", help=argparse.SUPPRESS)
    options = parser.parse_args()
    torch.set_num_threads(1)
    if options.step_times:
        print(step_times(options.task))
        return
    if options.truncate:
        truncate(options.task, options.truncate, options.trained)
        return
    if options.job:
        print(json.dumps(execute(Job(**json.loads(options.job)), options.trained)))
        return
    store = RESULTS / f"compress_{options.task}.jsonl"
    for start in TRUNCATIONS:
        if not truncated_file(options.trained, Job(options.task, SIZES[-1], start, "none")).exists():
            truncate(options.task, start, options.trained)
    arguments = [options.task, "--trained", str(options.trained)]
    jobs = jobs_of(options.task)
    results = perform(jobs, store, script=__file__, arguments=arguments, workers=options.jobs)
    dense = results[key_of(Job(options.task, 1.0, "trained", "none"))]
    (RESULTS / f"compress_{options.task}.md").write_text(page(options.task, list(results.values()), dense))


if __name__ == "__main__":
    main()
