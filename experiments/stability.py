"""Do the directions of weights settle because they have learned, or because the learning rate falls?

    python experiments/stability.py

LeNet5 on MNIST, dense, trained for three epochs by the recipe of its task (SGD, momentum 0.9, batch 128), once with its
learning rate throughout and once with a cosine that takes it to 0; the same seeds and batches. Every 25 steps all
weights are looked at: S, overlap and change are those of two looks 25 steps apart. One thread a run.
"""

import argparse
import json
import math
import time
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass
from statistics import mean, median, stdev
from typing import Any

import torch
from _contest import RESULTS
from _jobs import perform
from torch.optim.lr_scheduler import LambdaLR

from dynarank.experiments.tasks.lenet5 import LeNet5Task
from dynarank.report.points import Points
from dynarank.report.stability_drawing import draw_key, draw_map, draw_measure, draw_rate, draw_unrest
from dynarank.report.svg import MID_TONES, theme
from dynarank.report.ticks import label_steps
from dynarank.stability import WeightWatch

EPOCHS, EVERY, SEEDS = 3, 25, range(3)
STORE = RESULTS / "stability.jsonl"
LEFT_OUT = ("shape", "break_even", "bulk_level", "bulk_threshold", "positions", "singular_values")
RESOLVED = 2e-6  # 1 - S below is rounding in float32
NOTE = (
    "Means over the layers, mean ± standard deviation over seeds. Energy: part of ||W||_F^2 within the largest rank at "
    "which two factors are smaller. In the picture lines are seeds, the map is that of seed 0."
)
SCHEDULES: dict[str, Callable[[float], float]] = {  # part of the largest learning rate by part of the run
    "constant": lambda part: 1.0,
    "cosine": lambda part: 0.5 * (1 + math.cos(math.pi * part)),
}


@dataclass(frozen=True)
class Job:
    """One run."""

    schedule: str
    seed: int


def execute(job: Job) -> dict[str, Any]:
    """Train a network and return its looks, its test accuracy, and the seconds of a step and of a look."""
    torch.set_num_threads(1)
    torch.manual_seed(job.seed)
    task = LeNet5Task()
    model, batches = task.model(), task.training_batches(job.seed)
    steps = EPOCHS * batches.steps_per_epoch
    (optimizer,) = task.optimizers(model)
    scheduler = LambdaLR(optimizer, lambda step: SCHEDULES[job.schedule](step / steps))
    watch = WeightWatch(model)
    looks, seconds = [], {"step": [], "look": []}
    for step in range(steps + 1):
        if step % EVERY == 0:
            begun = time.perf_counter()
            layers = {name: measures(asdict(found)) for name, found in watch.look(step).items()}
            seconds["look"].append(time.perf_counter() - begun)
            looks.append({"step": step, "lr": optimizer.param_groups[0]["lr"], "layers": layers})
        if step == steps:
            break
        begun = time.perf_counter()
        batch = next(batches)
        optimizer.zero_grad()
        task.loss(task.forward(model, batch), batch).backward()
        optimizer.step()
        scheduler.step()
        seconds["step"].append(time.perf_counter() - begun)
    found = {f"{name}_seconds": round(median(values), 5) for name, values in seconds.items()}
    return {"test": task.evaluate(model, "test").accuracy, "looks": looks, **found}


def measures(found: dict[str, Any]) -> dict[str, Any]:
    """Return the measures of a look at a layer, to seven digits."""
    return {
        name: float(f"{value:.7g}") if isinstance(value, float) else value
        for name, value in found.items()
        if name not in LEFT_OUT
    }


# --- what the looks say ------------------------------------------------------------------------------------------


def curve(row: dict[str, Any], measure: str, layer: str | None = None) -> Points:
    """Return a measure of a run over time: of one layer, or its mean over all layers."""
    found = []
    for look in row["looks"]:
        values = [own[measure] for name, own in look["layers"].items() if layer in (None, name)]
        if None not in values:
            found.append((look["step"], mean(values)))
    return found


def in_quarter(row: dict[str, Any], quarter: int, points: Points) -> float:
    """Return the mean of the points in a quarter of the run, 0 to 3; each belongs to the window that it ends."""
    length = row["looks"][-1]["step"] / 4
    return mean(value for step, value in points if quarter * length < step <= (quarter + 1) * length)


def unrest(row: dict[str, Any], quarter: int) -> float:
    """Return the mean of 1 - S over layers and looks."""
    return 1 - in_quarter(row, quarter, curve(row, "stability"))


def turn_by_change(row: dict[str, Any], layer: str) -> float:
    """Return the median of ``(1 - S) / change^2`` over the looks of a layer at which float32 resolves ``1 - S``."""
    moved = dict(curve(row, "change", layer))
    return median((1 - S) / moved[step] ** 2 for step, S in curve(row, "stability", layer) if 1 - S > RESOLVED)


def correlation(rows: Iterable[dict[str, Any]]) -> float:
    """Return the correlation of ``log(1 - S)`` with ``log(change)`` over all layers and looks of runs."""
    found = [own for row in rows for look in row["looks"][1:] for own in look["layers"].values()]
    pairs = [(1 - own["stability"], own["change"]) for own in found if 1 - own["stability"] > RESOLVED]
    return float(torch.corrcoef(torch.tensor(pairs, dtype=torch.float64).log().T)[0, 1])


def findings(runs: dict[str, list[dict[str, Any]]]) -> list[str]:
    """Return one sentence for each finding."""
    constant, cosine = runs["constant"], runs["cosine"]
    early, late = ([mean(unrest(row, quarter) for row in rows) for rows in (constant, cosine)] for quarter in (1, 3))
    test = [spread(100 * row["test"] for row in rows) for rows in (constant, cosine)]
    energy = [spread(100 * curve(row, "retained_energy")[-1][1] for row in rows) for rows in (constant, cosine)]
    ratios = [turn_by_change(row, layer) for row in constant + cosine for layer in layers_of(row)]
    cost = median(row["look_seconds"] / row["step_seconds"] for row in constant + cosine)
    return [
        f"From the second quarter to the last, 1 - S falls {early[0] / late[0]:.1f}-fold with the constant learning "
        f"rate, to {late[0]:.1e}, and {early[1] / late[1]:.0f}-fold with the cosine, to {late[1]:.1e}.",
        f"log(1 - S) goes with the logarithm of the change: their correlation over all layers and looks is "
        f"{correlation(constant):.2f} with the constant learning rate and {correlation(cosine):.2f} with the cosine.",
        f"1 - S is between {min(ratios):.2f} and {max(ratios):.2f} times the squared change, as median of a layer and "
        "run.",
        f"At the end a rank that pays keeps {energy[0]} % of the energy with the constant learning rate and "
        f"{energy[1]} % with the cosine, although 1 - S is {late[0] / late[1]:.0f} times as large with the former.",
        f"Test accuracy is {test[0]} % with the constant learning rate and {test[1]} % with the cosine.",
        f"A look at all four layers takes {cost:.1f} times as long as a step of 128 images.",
    ]


def layers_of(row: dict[str, Any]) -> list[str]:
    """Return the names of the layers."""
    return list(row["looks"][0]["layers"])


# --- table and picture -------------------------------------------------------------------------------------------


def spread(values: Iterable[float], form: str = ".2f") -> str:
    """Return mean and, of several values, standard deviation."""
    values = list(values)
    return f"{mean(values):{form}}" + (f" ± {stdev(values):{form}}" if len(values) > 1 else "")


def page(runs: dict[str, list[dict[str, Any]]]) -> str:
    """Return findings and tables as Markdown."""
    _, command, text = (__doc__ or "").split("\n\n", 2)
    said = "\n".join(f"* {sentence}" for sentence in findings(runs))
    seeds = ", ".join(str(row["seed"]) for row in runs["cosine"])
    head = f"# Stability of a real run\n\n`{command.strip()}`, seeds {seeds}\n\n{text}\n{NOTE}"
    picture = "![S by layer and step, mean of 1 - S, change, energy and learning rate](stability.svg)"
    return "\n\n".join([head, said, picture, quarters(runs), layers_at_the_end(runs)]) + "\n"


def quarters(runs: dict[str, list[dict[str, Any]]]) -> str:
    """Return a row for each schedule and quarter of the run."""
    lines = ["| learning rate | quarter | 1 - S | change | overlap, % | energy, % |", "|---" * 6 + "|"]
    for name, rows in runs.items():
        for quarter in range(4):
            others = [[in_quarter(row, quarter, curve(row, m)) for row in rows] for m in ("change", "overlap")]
            energy = [100 * in_quarter(row, quarter, curve(row, "retained_energy")) for row in rows]
            cells = [spread((unrest(row, quarter) for row in rows), ".1e"), spread(others[0], ".4f")]
            cells += [spread((100 * value for value in others[1]), ".2f"), spread(energy)]
            lines.append(f"| {name} | {quarter + 1} | {' | '.join(cells)} |")
    return "\n".join(lines)


def layers_at_the_end(runs: dict[str, list[dict[str, Any]]]) -> str:
    """Return a row for each layer at the start and at the end of both schedules."""
    names = ("stable_rank", "effective_rank", "retained_energy", "above_bulk")
    lines = ["| layer | at | stable rank | effective rank | energy, % | above noise |", "|---" * 6 + "|"]
    places = [("start", runs["cosine"], 0), *((f"end, {name}", rows, -1) for name, rows in runs.items())]
    for layer in layers_of(runs["cosine"][0]):
        for title, rows, at in places:
            values = [[curve(row, measure, layer)[at][1] for row in rows] for measure in names]
            values[2] = [100 * value for value in values[2]]
            cells = [spread(own, form) for own, form in zip(values, (".1f", ".1f", ".2f", ".1f"), strict=True)]
            lines.append(f"| {layer} | {title} | {' | '.join(cells)} |")
    return "\n".join(lines)


def draw(runs: dict[str, list[dict[str, Any]]]) -> None:
    """Write the picture: a column for each schedule, the map of the first seed, lines of all of them."""
    with theme(MID_TONES):
        from matplotlib.figure import Figure

        figure = Figure(figsize=(9.6, 6.6), layout="constrained")
        parts = figure.subplots(5, len(runs), sharex=True, sharey="row", height_ratios=(9, 9, 9, 9, 6))
        for column, (name, rows) in enumerate(runs.items()):
            top, still, moved, kept, rate = (own[column] for own in parts)
            end = rows[0]["looks"][-1]["step"]
            draw_map(top, cells_of(rows[0]), palette=MID_TONES)
            top.set_title(f"{name} learning rate", loc="left", fontsize=11, pad=24)
            for row in rows:
                draw_unrest(still, {"mean": curve(row, "stability")}, palette=MID_TONES)
            for axes, measure, unit in ((moved, "change", ""), (kept, "retained_energy", "%")):
                for row in rows:
                    draw_measure(axes, {"mean": curve(row, measure)}, last_step=end, palette=MID_TONES, unit=unit)
                axes.set_xlabel("")
            draw_rate(rate, [(look["step"], look["lr"]) for look in rows[0]["looks"]], palette=MID_TONES)
            label_steps(rate, last_step=end)
        draw_key(parts[0, 1], palette=MID_TONES)
        for axes, label in zip(parts[:, 0], ("", "1 − S", "‖ΔW‖ / ‖W‖", "energy kept", "lr"), strict=True):
            axes.set_ylabel(label)
        for axes in parts[1:, 1]:
            axes.set_ylabel("")
        figure.savefig(RESULTS / "stability.svg", transparent=True, metadata={"Date": None})


def cells_of(row: dict[str, Any]) -> dict[str, list[tuple[int, int, float]]]:
    """Return S of each layer between looks."""
    return {
        name: [(step - EVERY, step, value) for step, value in curve(row, "stability", name)] for name in layers_of(row)
    }


def main() -> None:
    """Carry out what is missing and write table and picture."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--workers", type=int, default=1, help="processes at a time")
    parser.add_argument("--seeds", type=int, default=len(SEEDS), help="how many")
    parser.add_argument("--job", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.job:
        print(json.dumps(execute(Job(**json.loads(options.job)))))
        return
    jobs = [Job(schedule, seed) for seed in SEEDS[: options.seeds] for schedule in SCHEDULES]
    rows = list(perform(jobs, STORE, script=__file__, workers=options.workers).values())
    runs = {name: [row for row in rows if row["schedule"] == name] for name in SCHEDULES}
    (RESULTS / "stability.md").write_text(page(runs))
    draw(runs)


if __name__ == "__main__":
    main()
