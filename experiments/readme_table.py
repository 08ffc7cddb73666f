"""Writes the tables of the README from the committed runs: ``python experiments/readme_table.py``."""

import json
import statistics
from pathlib import Path

from _contest import RESULTS, TUNING_SEED

README = Path(__file__).parents[1] / "README.md"
TRAINING = "<!-- results -->", "<!-- end of results -->"
COMPRESSION = "<!-- compression -->", "<!-- end of compression -->"
COMPRESSED = {"resnet20": "ResNet-20, CIFAR-10, %", "gpt": "GPT, Shakespeare, loss", "lenet5": "LeNet5, MNIST, %"}
STEPS = [("svd", "none"), ("aware", "none"), ("aware", "tuned"), ("aware", "distilled"), ("scratch", "none")]
STORES = {"LeNet5": "lenet5_mnist", "MLP 784-500-500-500-500-10": "mlp_mnist"}


def main() -> None:
    """Fill in the tables between their marks."""
    text = README.read_text()
    for marks, lines in ((TRAINING, _training()), (COMPRESSION, _compression())):
        begin, end = (text.index(mark) for mark in marks)
        text = text[: begin + len(marks[0])] + "\n" + "\n".join(lines) + "\n" + text[end:]
    README.write_text(text)


def _compression() -> list[str]:
    """Return the lines of the table of compressed networks."""
    lines = [
        "| trained network | parameters left | plain SVD | activation-aware | then fine-tuned | then distilled "
        "| narrower, trained from scratch |",
        "|---|---|---|---|---|---|---|",
    ]
    for task, name in COMPRESSED.items():
        path = RESULTS / f"compress_{task}.jsonl"
        runs = [json.loads(line) for line in path.read_text().splitlines()]
        percent = name.endswith("%")
        trained = next(run["test"] for run in runs if run["start"] == "trained")
        value = f"{100 * trained['accuracy']:.2f}" if percent else f"{trained['loss']:.3f}"
        for size in sorted({run["size"] for run in runs} - {1.0}, reverse=True):
            cells = []
            for step in STEPS:
                found = [run["test"] for run in runs if (run["size"], run["start"], run["recovery"]) == (size, *step)]
                values = [100 * quality["accuracy"] if percent else quality["loss"] for quality in found]
                cells.append(_spread(values, digits=2 if percent else 3))
            lines.append(f"| {name}: {value} | {size:.0%} | {' | '.join(cells)} |")
    return lines


def _spread(values: list[float], *, digits: int) -> str:
    if not values:
        return "-"
    spread = f" ± {statistics.stdev(values):.{digits}f}" if len(values) > 1 else ""
    return f"{statistics.mean(values):.{digits}f}{spread}"


def _training() -> list[str]:
    """Return the lines of the table of networks trained at low rank."""
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
        for size in sorted({name.split(", ")[2] for name in found if ", from rank 2, " in name}):
            own = [name for name in found if f", from rank 2, {size}" in name]
            lines += [_row(model, found, size, name) for name in sorted(own, key=lambda name: (name.count(", "), name))]
    return lines


def _row(model: str, found: dict[str, list[dict]], size: str, name: str) -> str:
    """Return the row of one model, size and integrator, with the learning rate where it is not the common one."""
    own = found[name]
    low = [own, found.get(name.replace("from rank 2", "from dense"), [])]
    dense = [found[f"narrower dense, {label}, {size}"] for label in ("SGD", "Muon")]
    share = f"{100 * own[0]['parameters'] / own[0]['dense_parameters']:.1f} %"
    cells = [_cell(runs) for runs in (*low, *dense, found["dense, SGD"])]
    integrator, _, _, *step = name.split(", ")
    return f"| {', '.join((model, integrator, *step))} | {share} | {' | '.join(cells)} |"


def _cell(runs: list[dict]) -> str:
    """Return the mean and the standard deviation of the test accuracy in percent."""
    return _spread([100 * run["test_accuracy"] for run in runs], digits=2)


if __name__ == "__main__":
    main()
