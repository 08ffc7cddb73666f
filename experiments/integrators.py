"""How accurate integrators are, each with its own learning rate: how the default and the fast one were chosen.

    python experiments/integrators.py --workers 3

Three epochs of MNIST from rank 2, every layer factorised: LeNet5 with 95 % removed, and the MLP 784-500-500-500-500-10
with 90 % removed. The learning rate of each method is tuned among five on validation images with one extra seed. What a
step of each costs is measured by `dynarank bench`: see the folder bench.
"""

import argparse
from dataclasses import asdict

from _contest import RESULTS, Run, perform, row_of, tuned

SEEDS = range(3)
LRS = (0.02, 0.05, 0.1, 0.2, 0.4)
SHARED = (
    ("epochs", 3),
    ("batch_size", 128),
    ("include_head", True),
    ("freeze", 0.4),
    ("every", 50),
    ("rank_options", ("growth=0.5",)),
)
LENET5 = (("data", "mnist"), ("model", "lenet5"), *SHARED, ("budget", 0.05))
MLP = (("data", "mnist"), ("model", "mlp"), ("hidden", (500, 500, 500, 500)), *SHARED, ("budget", 0.1))
NETWORKS = {
    "LeNet5, 95 % removed": (
        LENET5,
        (
            "augmented_bug",
            "gauge_fixed",
            "gauge_fixed_muon",
            "parallel_bug",
            "plain_factors",
            "tangent_heavy_ball",
            "tangent_muon",
        ),
    ),
    "MLP, 90 % removed": (MLP, ("gauge_fixed", "gauge_fixed_muon", "plain_factors", "tangent_muon")),
}


def accuracy(config: tuple, names: tuple[str, ...], workers: int) -> str:
    """Return the table of one network, each method with its own learning rate."""
    store = RESULTS / "integrators.jsonl"
    rows = [Run(name, 0, 0.0, (*config, ("integrator", name))) for name in names]
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


def main() -> None:
    """Train what is missing and write the page."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--workers", type=int, default=2)
    workers = parser.parse_args().workers
    tables = [f"## {title}\n\n{accuracy(*of, workers)}" for title, of in NETWORKS.items()]
    note = (__doc__ or "").split("\n\n", 2)[2].strip()
    head = f"# Integrators\n\n`python experiments/integrators.py`, seeds {SEEDS.start}-{SEEDS.stop - 1}"
    text = "\n\n".join([head, note, *tables]) + "\n"
    (RESULTS / "integrators.md").write_text(text)
    print(text)


if __name__ == "__main__":
    main()
