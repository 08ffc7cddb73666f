"""Predicted against measured time of a forward pass, for every compressed network and two batch sizes.

    python experiments/predicted_latency.py --trained runs/trained

The prediction is made before anything is changed: the measured time of the dense network, less that of the layers to be
replaced, plus that of their replacements, timed one by one at a few ranks. Then the network is compressed, written as
plain layers and timed beside the dense one, interleaved, with the dense one twice (A/A). One thread.
"""

import argparse
import copy
import json
import statistics
from pathlib import Path
from typing import Any

import torch

from dynarank.checkpoint import load_model
from dynarank.compress import Compressor, kl_divergence
from dynarank.experiments.tasks import TASKS
from dynarank.factorize import to_plain_
from dynarank.measure import latency

RESULTS = Path(__file__).parent / "results"
SIZES = (0.75, 0.5, 0.33, 0.25)
BATCHES = {"resnet20": (1, 64), "gpt": (1, 32), "lenet5": (1, 256)}


def rows_of(name: str, trained: Path, batch_size: int) -> list[dict[str, Any]]:
    """Return a row for every size of one network at one batch size."""
    task = TASKS[name]()
    model = task.model()
    load_model(trained / f"{name}-0", model)
    model.eval()
    example = tuple(part[:batch_size].contiguous() for part in task.calibration_batches()[0])
    calibration = [example, *task.calibration_batches()]
    compressor = Compressor(model, calibration=calibration, divergence=kl_divergence, timed=0.1)
    rows = []
    for size in SIZES:
        plan = compressor.plan(size)
        compressed = copy.deepcopy(model)
        compressor.apply_(plan, model=compressed)
        to_plain_(compressed)
        times = latency({"dense": model, "again": model, "compressed": compressed}, example, seconds=6.0)
        assert plan.report.seconds_after is not None
        rows.append(
            {
                "network": name,
                "batch": batch_size,
                "size": size,
                "dense": times["dense"].median,
                "again": times["again"].median,
                "predicted": plan.report.seconds_after,
                "measured": times["compressed"].median,
                "low": times["compressed"].low,
                "high": times["compressed"].high,
            }
        )
        print(json.dumps(rows[-1]), flush=True)
    return rows


def table(rows: list[dict[str, Any]]) -> str:
    """Return the rows as Markdown, times relative to the dense network."""
    lines = [
        "| network | batch | size | dense, ms | A/A | predicted | measured (quartiles) | predicted / measured |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for r in rows:
        d = r["dense"]
        lines.append(
            f"| {r['network']} | {r['batch']} | {r['size']:.0%} | {1e3 * d:.2f} | {r['again'] / d:.3f} | "
            f"{r['predicted'] / d:.3f} | {r['measured'] / d:.3f} ({r['low'] / d:.3f}-{r['high'] / d:.3f}) | "
            f"{r['predicted'] / r['measured']:.3f} |"
        )
    return "\n".join(lines)


def main() -> None:
    """Measure and write the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--trained", type=Path, default=Path("runs/trained"))
    options = parser.parse_args()
    torch.set_num_threads(1)
    rows = [row for name, sizes in BATCHES.items() for batch in sizes for row in rows_of(name, options.trained, batch)]
    off = [abs(r["predicted"] / r["measured"] - 1) for r in rows]
    (RESULTS / "predicted_latency.md").write_text(
        "# Predicted against measured latency\n\n"
        "`python experiments/predicted_latency.py`: times relative to the dense network, one thread, interleaved.\n\n"
        f"{table(rows)}\n\n"
        f"Of {len(rows)} predictions {sum(o <= 0.15 for o in off)} are within 15 % of the measurement; the median is "
        f"off by {statistics.median(off):.1%}, the worst by {max(off):.1%}.\n"
    )


if __name__ == "__main__":
    main()
