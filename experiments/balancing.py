"""What balancing two factors costs beside a step of their layer: ``python experiments/balancing.py``.

A step is a forward and a backward pass of one layer with 256 rows, without an update; balancing turns both factors and
both averages, as the gauge-fixed integrators do. Milliseconds of the CPU's time with one thread, float32, medians of 15
rounds, the two in turn. "by the rule" is the ratio that the integrators expect, which decides the interval.
"""

import statistics
import time
from pathlib import Path

import torch

from dynarank.experiments.proof import machine
from dynarank.factors import FactorPair
from dynarank.integrators.gauge_fixed_muon import GaugeFixedMuon

RESULTS = Path(__file__).parent / "results"
SHAPES = ((512, 64), (512, 128), (1024, 256), (2048, 64), (2048, 160), (2048, 320), (5120, 160), (5120, 320))
ROWS, WARM_UP, ROUNDS = 256, 2, 15


def row(width: int, rank: int) -> str:
    """Return the line of one layer."""
    torch.manual_seed(0)
    method = GaugeFixedMuon(rows=ROWS)
    pair = FactorPair(torch.randn(rank, width), torch.randn(rank, width))
    A, B = (factor.clone().requires_grad_() for factor in (pair.A, pair.B))
    inputs, state = torch.randn(ROWS, width, requires_grad=True), method.init(pair)
    steps, balancings = [], []
    for number in range(WARM_UP + ROUNDS):
        A.grad = B.grad = inputs.grad = None
        began = time.process_time()
        ((inputs @ B.mT) @ A).sum().backward()
        middle = time.process_time()
        method.balance_(pair, state)
        if number >= WARM_UP:
            steps.append(1e3 * (middle - began))
            balancings.append(1e3 * (time.process_time() - middle))
    step, balancing = statistics.median(steps), statistics.median(balancings)
    expected = method.cost(pair.shape, rank)
    cells = (f"{step:.2f}", f"{balancing:.2f}", f"{balancing / step:.2f}", f"{expected:.2f}")
    return f"| {width} x {width} | {rank} | {' | '.join(cells)} | {method.interval(pair.shape, rank, 10**6)} |"


def main() -> None:
    """Measure every layer and write the page."""
    torch.set_num_threads(1)
    head = ["# Balancing", "", "`python experiments/balancing.py`", ""]
    head += ["| layer | rank | step | balancing | ratio | by the rule | interval |", "|---|---|---|---|---|---|---|"]
    note = (__doc__ or "").split("\n\n", 1)[1].strip()
    lines = [
        *head,
        *(row(*shape) for shape in SHAPES),
        "",
        note,
        "",
        f"Machine: {', '.join(map(str, machine().values()))}.",
    ]
    (RESULTS / "balancing.md").write_text("\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
