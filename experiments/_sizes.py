"""One model at given sizes: low rank from two starts, beside dense and narrower dense networks of equal size.

Ten epochs, batch 128, 50,000 training images, no augmentation, accuracy on the 10,000 test images at the last step.
Dense networks have the best of three learning rates, each its own, on the validation images with one extra seed. An
integrator has one learning rate for all its rows in all tables, that was best on average over them; half of it is
shown too. Parameters count every tensor of the compacted network, biases included. Differences are in points of test
accuracy, paired by seed, with a 95 % interval (Student's t). Runs are kept in a .jsonl file, so that an interrupted
table goes on where it was.
"""

import argparse
from dataclasses import asdict
from typing import Any

from _contest import RESULTS, TUNING_SEED, Run, perform, row_of, tuned

SEEDS = range(5)
LRS = (0.025, 0.05, 0.1)
LOW_RANK_LRS = {"gauge_fixed_muon": 0.05, "tangent_muon": 0.025}  # best on average over the tuning runs of all tables
SHARED = (
    ("epochs", 10),
    ("batch_size", 128),
    ("freeze", 0.4),
    ("every", 50),
    ("rank_options", ("growth=0.5",)),
)
STARTS = {"low": "rank 2", "dense": "dense"}
RIVALS = {"sgd": "SGD", "muon": "Muon"}


def rows(problem: tuple[tuple[str, Any], ...], budgets: tuple[float, ...], full: int) -> dict[str, tuple[Run, ...]]:
    """Return the rows of the table, one run each without seed; rows of one group are tuned together."""
    config = (*problem, *SHARED)
    groups = {integrator: _low(integrator, config, budgets) for integrator in LOW_RANK_LRS}
    groups["dense"] = (Run("dense, SGD", 0, 0.0, config, "sgd"),)
    for budget in budgets:
        for optimizer, label in RIVALS.items():
            name = f"narrower dense, {label}, {1 - budget:.0%} removed"
            groups[name] = (Run(name, 0, 0.0, config, optimizer, int(budget * full)),)
    return groups


def _low(integrator: str, config: tuple[tuple[str, Any], ...], budgets: tuple[float, ...]) -> tuple[Run, ...]:
    config = (*config, ("integrator", integrator))
    return tuple(
        Run(
            f"{integrator}, from {label}, {1 - budget:.0%} removed",
            0,
            0.0,
            (*config, ("budget", budget), ("start", start)),
        )
        for budget in budgets
        for start, label in STARTS.items()
    )


def table(found: dict[str, list[dict[str, Any]]], budgets: tuple[float, ...]) -> str:
    """Return the Markdown table; every row is compared with its rivals of the same size."""
    lines = [
        "| network | lr | test % (mean ± sd) | worst | parameters | removed % | against dense "
        "| against narrower, SGD | against narrower, Muon | ranks |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    for name, own in found.items():
        size = next((f"{1 - b:.0%} removed" for b in budgets if f"{1 - b:.0%} removed" in name), None)
        narrower = [found[f"narrower dense, {label}, {size}"] if size else own for label in RIVALS.values()]
        lines.append(row_of(own, [found["dense, SGD"], *narrower]))
    return "\n".join(lines)


def main(
    name: str,
    title: str,
    problem: tuple[tuple[str, Any], ...],
    budgets: tuple[float, ...],
    full: int,
) -> None:
    """Carry out the runs that are missing and write the table ``results/<name>.md``.

    Rank-2 rows with half the learning rate are added, to show what the common one costs.
    """
    parser = argparse.ArgumentParser(description=title)
    parser.add_argument("--workers", type=int, default=2, help="runs at a time, one thread each")
    workers = parser.parse_args().workers
    store = RESULTS / f"{name}.jsonl"
    groups = rows(problem, budgets, full)
    # Low rank is tuned on its rank-2 start, at all sizes together.
    trials = [tuple(r for r in group if ("start", "dense") not in r.config) for group in groups.values()]
    best = dict(zip(groups, tuned(trials, LRS, store, workers=workers), strict=True))
    best |= LOW_RANK_LRS
    chosen = [
        [Run(**{**asdict(run), "seed": seed, "lr": best[key], "config": run.config}) for seed in SEEDS]
        for key, group in groups.items()
        for run in group
    ]
    for integrator, lr in LOW_RANK_LRS.items():
        for run in trials[list(groups).index(integrator)]:
            label = {"name": f"{run.name}, lr {lr / 2:g}", "lr": lr / 2, "config": run.config}
            chosen.append([Run(**{**asdict(run), **label, "seed": seed}) for seed in SEEDS])
    results = perform([run for row in chosen for run in row], store, workers=workers)
    text = table({row[0].name: [results[run.key()] for run in row] for row in chosen}, budgets)
    made = f"`python experiments/{name}.py`, seeds {SEEDS.start}-{SEEDS.stop - 1}, tuning seed {TUNING_SEED}"
    note = (__doc__ or "").split("\n\n", 1)[1].replace("\n", " ").strip()
    (RESULTS / f"{name}.md").write_text(f"# {title}\n\n{made}\n\n{text}\n\n{note}\n")
    print(text)
