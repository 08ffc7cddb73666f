"""LeNet5 on MNIST from a tenth of the parameters down to 1.5 %, beside the published points counted in the same way.

    python experiments/lenet5_pareto.py

Reads the committed rows of ``results/compare/lenet5_pareto`` (ranks that share a budget) and, where it is there,
``results/compare/lenet5_tolerance`` (ranks by a tolerance); the commands stand under the tables in these folders. The
published points are those of the authors of DLRT, five runs of 20 epochs: mean at the last epoch, and mean at the epoch
of the best validation loss. Their parameters leave out one of the two bases of every layer; here they are counted anew
from the published ranks of the best run, as ``r (m + n)`` for the three low-rank layers, the dense head and the biases.
"""

import json
import statistics
from collections import defaultdict

from _contest import RESULTS

FOLDERS = ("lenet5_pareto", "lenet5_tolerance")
SHAPES = ((20, 25), (50, 500), (500, 800))
HEAD_AND_BIASES = 5000 + 580
DENSE = 431_080
# Tolerance, ranks, test accuracy in % at the last epoch and at the epoch of the best validation loss, part of the
# parameters said to be removed, in %. From github.com/COMPiLELab/DLRT-Net.
PUBLISHED = (
    (0.09, (10, 23, 62), 98.15, 98.16, 91.3),
    (0.11, (10, 20, 48), 96.80, 98.21, 93.0),
    (0.13, (9, 16, 37), 97.57, 97.87, 94.3),
    (0.15, (9, 16, 28), 97.86, 98.14, 95.3),
    (0.2, (8, 8, 15), 97.95, 98.12, 97.0),
    (0.3, (4, 6, 8), 95.73, 97.45, 97.8),
    (0.4, (2, 4, 4), 94.83, 95.97, 98.3),
    (0.45, (2, 2, 3), 90.46, 94.07, 98.5),
)


def counted(ranks: tuple[int, ...]) -> int:
    """Return all numbers of the network at these ranks, both bases of each layer included."""
    return HEAD_AND_BIASES + sum(rank * (m + n) for rank, (m, n) in zip(ranks, SHAPES, strict=True))


def ours() -> list[tuple[float, str]]:
    """Return the lines of the committed comparisons with the part of the parameters that is left."""
    found = defaultdict(list)
    for folder in FOLDERS:
        path = RESULTS / "compare" / folder / "rows.jsonl"
        for line in path.read_text().splitlines() if path.exists() else ():
            row = json.loads(line)
            if row.get("final") and "test" in row:
                found[row["method"], json.dumps(row["size"])].append(row)
    lines = []
    for (method, size), rows in found.items():
        left = statistics.mean(row["parameters"] for row in rows) / DENSE
        accuracies = [100 * row["test"]["accuracy"] for row in rows]
        name = method.partition(":")[0] + (", by tolerance" if '"tolerance": 0' in size else "")
        spread = f"{statistics.mean(accuracies):.2f} ± {statistics.stdev(accuracies):.2f}"
        lines.append((left, f"| {name} | {100 * (1 - left):.1f} | {spread} | {len(rows)} |  |"))
    return lines


def published() -> list[tuple[float, str]]:
    """Return the lines of the published points with the part of the parameters that is left."""
    lines = []
    for tolerance, ranks, last, best, said in PUBLISHED:
        left = counted(ranks) / DENSE
        name = f"published DLRT, tolerance {tolerance:g}, ranks {', '.join(map(str, ranks))}"
        note = f"said to be {said} % removed; {best:.2f} at the best epoch"
        lines.append((left, f"| {name} | {100 * (1 - left):.1f} | {last:.2f} | 5 | {note} |"))
    return lines


def main() -> None:
    """Write the table, the largest networks first."""
    head = ["| network | removed % | test % at the last step | runs |  |", "|---" * 5 + "|"]
    body = [line for _, line in sorted([*ours(), *published()], reverse=True)]
    _, command, text = (__doc__ or "").split("\n\n", 2)
    page = ["# LeNet5 on MNIST, from 90 % removed on", f"`{command.strip()}`", text.strip(), "\n".join(head + body)]
    (RESULTS / "lenet5_pareto.md").write_text("\n\n".join(page) + "\n")


if __name__ == "__main__":
    main()
