"""What it brings to store factors in multiples of 8 or 16 rows: ``python experiments/rank_multiple.py``.

A forward and a backward pass of one linear layer, in milliseconds of the CPU's time with one thread: the rank as it is,
then padded with rows of zeros to the next multiple of 8 and of 16. Medians of 20 rounds, all layers in turn. "again" is
the rank as it is a second time: what differs less than that is noise.
"""

import statistics
import time
from pathlib import Path

import torch

from dynarank.experiments.proof import machine
from dynarank.layers.linear import LowRankLinear

RESULTS = Path(__file__).parent / "results"
SHAPES = ((512, 256), (2048, 256), (1024, 1024))  # width, rows
RANKS = (12, 15, 16, 17, 31, 32, 33, 47, 48, 49, 63, 64, 65)
MULTIPLES = (1, 8, 16, 1)
WARM_UP, ROUNDS = 3, 20


def seconds(layer: LowRankLinear, inputs: torch.Tensor) -> float:
    """Return what a forward and a backward pass take."""
    layer.zero_grad()
    inputs.grad = None
    began = time.process_time()
    layer(inputs).sum().backward()
    return time.process_time() - began


def table(width: int, rows: int) -> list[str]:
    """Return the lines of one shape."""
    torch.manual_seed(0)
    inputs = torch.randn(rows, width, requires_grad=True)
    layers = {
        (rank, place): LowRankLinear(width, width, rank=rank, rank_multiple=multiple)
        for rank in RANKS
        for place, multiple in enumerate(MULTIPLES)
    }
    times: dict[tuple[int, int], list[float]] = {key: [] for key in layers}
    for number in range(WARM_UP + ROUNDS):
        for key in list(layers)[:: 1 if number % 2 else -1]:
            taken = seconds(layers[key], inputs)
            if number >= WARM_UP:
                times[key].append(taken)
    lines = [
        f"## {width} x {width}, {rows} rows",
        "",
        "| rank | as it is | of 8 | of 16 | again |",
        "|---|---|---|---|---|",
    ]
    for rank in RANKS:
        cells = (f"{1e3 * statistics.median(times[rank, place]):.2f}" for place in range(len(MULTIPLES)))
        lines.append(f"| {rank} | {' | '.join(cells)} |")
    return [*lines, ""]


def main() -> None:
    """Measure every shape and write the page."""
    torch.set_num_threads(1)
    head = ["# Ranks in multiples", "", "`python experiments/rank_multiple.py`", ""]
    lines = [line for width, rows in SHAPES for line in table(width, rows)]
    note = (__doc__ or "").split("\n\n", 1)[1].strip()
    made = ", ".join(str(value) for value in machine().values())
    (RESULTS / "rank_multiple.md").write_text("\n".join([*head, *lines, note, "", f"Machine: {made}."]) + "\n")


if __name__ == "__main__":
    main()
