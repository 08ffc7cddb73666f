"""LeNet5 on MNIST at two sizes: low rank from two starts, beside dense and narrower dense networks.

    python experiments/lenet5_mnist.py --workers 3

Ten epochs, batch 128, 50,000 training images, no augmentation, accuracy on the 10,000 test images at the last step.
The learning rate of each row is the best of three on the validation images with one extra seed; low rank has one for
all its rows. Parameters count every tensor of the compacted network, biases included. All layers are factorised, the
head too, in the low-rank rows. Runs are kept in lenet5_mnist.jsonl, so an interrupted table goes on where it was.
"""

import argparse
from dataclasses import asdict

from _contest import RESULTS, Run, perform, row_of, tuned

SEEDS = range(5)
BUDGETS = (0.05, 0.03)
LRS = (0.025, 0.05, 0.1)
SHARED = (
    ("data", "mnist"),
    ("model", "lenet5"),
    ("epochs", 10),
    ("batch_size", 128),
    ("include_head", True),
    ("freeze", 0.4),
    ("every", 50),
    ("rank_options", ("growth=0.5",)),
)
FULL = 431_080


def rows() -> dict[str, tuple[Run, ...]]:
    """Return the rows of the table, one run each without seed; rows of one group are tuned together."""
    low = tuple(
        Run(
            f"low rank, from {label}, {1 - budget:.0%} removed", 0, 0.0, (*SHARED, ("budget", budget), ("start", start))
        )
        for budget in BUDGETS
        for start, label in (("low", "rank 2"), ("dense", "dense"))
    )
    groups = {"low rank": low, "dense": (Run("dense, SGD", 0, 0.0, SHARED, "sgd"),)}
    for budget in BUDGETS:
        for optimizer, label in (("sgd", "SGD"), ("muon", "Muon")):
            name = f"narrower dense, {label}, {1 - budget:.0%} removed"
            groups[name] = (Run(name, 0, 0.0, SHARED, optimizer, int(budget * FULL)),)
    return groups


def main() -> None:
    """Carry out the runs and write the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--workers", type=int, default=2)
    workers = parser.parse_args().workers
    store = RESULTS / "lenet5_mnist.jsonl"
    groups = rows()
    # Low rank is tuned on its rank-2 start, at both sizes together.
    trials = [tuple(r for r in group if ("start", "dense") not in r.config) for group in groups.values()]
    best = dict(zip(groups, tuned(trials, LRS, store, workers=workers), strict=True))
    chosen = [
        [Run(**{**asdict(run), "seed": seed, "lr": best[name], "config": run.config}) for seed in SEEDS]
        for name, group in groups.items()
        for run in group
    ]
    results = perform([run for row in chosen for run in row], store, workers=workers)
    table = {row[0].name: [results[run.key()] for run in row] for row in chosen}
    lines = [
        "| network | lr | test % (mean ± sd) | worst | parameters | removed % | against dense | against narrower, SGD "
        "| against narrower, Muon | ranks |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    for name, own in table.items():
        size = next((f"{1 - b:.0%} removed" for b in BUDGETS if f"{1 - b:.0%} removed" in name), None)
        rivals = [table["dense, SGD"]]
        rivals += [table[f"narrower dense, {o}, {size}"] if size else own for o in ("SGD", "Muon")]
        lines.append(row_of(own, rivals))
    text = "\n".join(lines)
    head = f"# LeNet5 on MNIST\n\n`python experiments/lenet5_mnist.py`, seeds {SEEDS.start}-{SEEDS.stop - 1}; "
    head += "tuning seed 100.\n\n"
    note = "\n\nDifferences are in points of test accuracy, paired by seed, with a 95 % interval (Student's t). "
    (RESULTS / "lenet5_mnist.md").write_text(
        head + text + note + __doc__.split("\n\n", 2)[2].replace("\n", " ").strip() + "\n"
    )
    print(text)


if __name__ == "__main__":
    main()
