"""Time of one LeNet5 training step against dense: one process, one thread, methods in turn, with an A/A pair.

    python experiments/step_time.py

A step is zero_grad, forward, loss, backward and optimizer step on a batch of 128, ranks fixed, in process CPU time.
Every round runs each method once, in alternating order; the ratio to the first dense network is taken within a round.
The A/A row is a second, identical dense network: differences inside its interval mean nothing.
"""

import argparse
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import nn
from torch.nn import functional

from dynarank import LowRankOptimizer, factorize_
from dynarank.models import LeNet5
from dynarank.ranks.fixed import Fixed

RESULTS = Path(__file__).parent / "results"
RANKS = {"10, 25, 60": (10, 25, 60), "8, 10, 16": (8, 10, 16), "20, 7, 10": (20, 7, 10)}
INTEGRATORS = ("tangent_muon", "tangent_heavy_ball", "parallel_bug", "plain_factors")


def stepper(
    model: nn.Module, optimizer: torch.optim.Optimizer, shape: tuple[int, ...] = (128, 1, 28, 28)
) -> Callable[[], None]:
    """Return a function that takes one training step on a fixed batch."""
    inputs, targets = torch.randn(shape), torch.randint(10, shape[:1])

    def step() -> None:
        optimizer.zero_grad()
        functional.cross_entropy(model(inputs), targets).backward()
        optimizer.step()

    return step


def dense() -> Callable[[], None]:
    """Return the step of the dense network with SGD and Nesterov momentum."""
    model = LeNet5()
    return stepper(model, torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9, nesterov=True))


def low_rank(ranks: tuple[int, int, int], integrator: str) -> Callable[[], None]:
    """Return the step of a factorised network; layers above break-even stay factorised too."""
    model = LeNet5()
    factorize_(
        model, rank_pattern=dict(zip(("conv1", "conv2", "fc1"), ranks, strict=True)), keep_dense_above_break_even=False
    )
    base = {"lr": 0.01, "momentum": 0.9, "nesterov": True}
    options = {"lr": 1e-3, "integrator": integrator, "rank_policy": Fixed()}
    return stepper(model, LowRankOptimizer(model, base=torch.optim.SGD, base_options=base, **options))


def measure(steps: dict[str, Callable[[], None]], rounds: int) -> dict[str, list[float]]:
    """Return the CPU milliseconds of each method in each round, methods in alternating order."""
    times: dict[str, list[float]] = {name: [] for name in steps}
    for index in range(-3, rounds):  # three rounds to warm up
        for name in list(steps) if index % 2 else reversed(list(steps)):
            start = time.process_time()
            steps[name]()
            if index >= 0:
                times[name].append(1e3 * (time.process_time() - start))
    return times


def table(times: dict[str, list[float]]) -> str:
    """Return a Markdown table of medians and of the ratios to dense, with their quartiles and a 95 % interval."""
    lines = [
        "| method | ms (median) | ratio to dense | quartiles | 95 % interval of the median |",
        "|---|---|---|---|---|",
    ]
    for name, values in times.items():
        ratios = sorted(a / b for a, b in zip(values, times["dense"], strict=True))
        low, middle, high = statistics.quantiles(ratios, n=4)
        spread = 0.98 * len(ratios) ** 0.5  # binomial: half the width of the interval, in ranks
        first, last = int(len(ratios) / 2 - spread), min(len(ratios) - 1, int(len(ratios) / 2 + spread))
        row = (name, f"{statistics.median(values):.1f}", f"{middle:.3f}", f"{low:.3f}-{high:.3f}")
        lines.append(f"| {' | '.join(row)} | {ratios[first]:.3f}-{ratios[last]:.3f} |")
    return "\n".join(lines)


def main() -> None:
    """Measure and write the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=101)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    steps = {"dense": dense(), "dense again (A/A)": dense()}
    for label, ranks in RANKS.items():
        steps |= {f"{name}, ranks {label}": low_rank(ranks, name) for name in INTEGRATORS}
    text = table(measure(steps, arguments.rounds))
    head = f"# Time of a LeNet5 step\n\n`python experiments/step_time.py --rounds {arguments.rounds}`\n\n"
    note = f"\n\n{__doc__.split(chr(10) * 2, 2)[2].strip()} torch {torch.__version__}, float32.\n"
    (RESULTS / "step_time.md").write_text(head + text + note)
    print(text)


if __name__ == "__main__":
    main()
