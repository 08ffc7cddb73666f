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
            columns = ("low rank, from rank 2", "low rank, from dense", "narrower dense, SGD", "narrower dense, Muon")
            cells = [_cell(found[f"{column}, {size}"]) for column in columns]
            own = found[f"low rank, from rank 2, {size}"][0]
            share = f"{100 * own['parameters'] / own['dense_parameters']:.1f} %"
            lines.append(f"| {model} | {share} | {' | '.join(cells)} | {_cell(found['dense, SGD'])} |")
    text = README.read_text()
    head, tail = text[: text.index(BEGIN) + len(BEGIN)], text[text.index(END) :]
    README.write_text(head + "\n" + "\n".join(lines) + "\n" + tail)


def _cell(runs: list[dict]) -> str:
    """Return the mean and the standard deviation of the test accuracy in percent."""
    tests = [100 * run["test_accuracy"] for run in runs]
    return f"{statistics.mean(tests):.2f} ± {statistics.stdev(tests):.2f}"


if __name__ == "__main__":
    main()
