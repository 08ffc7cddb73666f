"""Writes the table of the README from the committed runs: ``python experiments/readme_table.py``."""

import json
import statistics
from pathlib import Path

from _contest import RESULTS, TUNING_SEED

README = Path(__file__).parents[1] / "README.md"
BEGIN, END = "<!-- results -->", "<!-- end of results -->"
STORES = {"LeNet5": "lenet5_mnist", "MLP 784-500-500-500-500-10": "mlp_mnist"}


def main() -> None:
    """Fill in the table between the two marks."""
    lines = [
        "| MNIST, five seeds | parameters | low rank, from rank 2 | low rank, from dense | narrower dense, SGD "
        "| narrower dense, Muon | dense |",
        "|---|---|---|---|---|---|---|",
    ]
    for model, store in STORES.items():
        runs = [json.loads(line) for line in (RESULTS / f"{store}.jsonl").read_text().splitlines()]
        found: dict[str, list[dict]] = {}
        for run in runs:
            if run["seed"] != TUNING_SEED:
                found.setdefault(run["name"], []).append(run)
        for size in sorted({name.split(", ")[2] for name in found if name.startswith("low rank")}):
            for step in ("", *sorted({", " + n.split(", ")[3] for n in found if n.count(", ") == 3 and size in n})):
                lines.append(_row(model, found, size, step))
    text = README.read_text()
    head, tail = text[: text.index(BEGIN) + len(BEGIN)], text[text.index(END) :]
    README.write_text(head + "\n" + "\n".join(lines) + "\n" + tail)


def _row(model: str, found: dict[str, list[dict]], size: str, step: str) -> str:
    """Return the row of one model and size; ``step`` tells the learning rate where it is not the common one."""
    own = found[f"low rank, from rank 2, {size}{step}"]
    low = [own, found.get(f"low rank, from dense, {size}{step}", [])]
    dense = [found[f"narrower dense, {label}, {size}"] for label in ("SGD", "Muon")]
    share = f"{100 * own[0]['parameters'] / own[0]['dense_parameters']:.1f} %"
    cells = [_cell(runs) for runs in (*low, *dense, found["dense, SGD"])]
    return f"| {model}, lr {own[0]['lr']:g} | {share} | {' | '.join(cells)} |"


def _cell(runs: list[dict]) -> str:
    """Return the mean and the standard deviation of the test accuracy in percent."""
    if len(runs) < 2:
        return "-"
    tests = [100 * run["test_accuracy"] for run in runs]
    return f"{statistics.mean(tests):.2f} ± {statistics.stdev(tests):.2f}"


if __name__ == "__main__":
    main()
