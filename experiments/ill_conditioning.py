"""What small singular values at the start do to training: manifold methods against plain ``U V^T``.

    python experiments/ill_conditioning.py --workers 3

LeNet5 on MNIST with every layer at rank 20 (the head, 10 x 500, at 10). The layers start as the truncated SVD of
torch's own initialisation, with the singular values divided by 1, 2^k or 10^k, k = 0, 1, ...; the manifold methods
write none below 1e-8 of the largest. Four epochs, batch 128, constant learning rate; for each method and decay the best
of five learning rates on validation images with one extra seed. Accuracy on the test images at the
last step, one thread a run.
"""

import argparse
import json
import statistics
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from _contest import RESULTS
from _jobs import key_of, perform
from torch import nn
from torch.nn.functional import cross_entropy

from dynarank import LowRankOptimizer, factorize_
from dynarank.data import Batches, load_mnist
from dynarank.errors import NonFiniteGradientError
from dynarank.experiments.tasks.base import classification_quality
from dynarank.factors import FactorPair
from dynarank.layers.base import low_rank_layers
from dynarank.models import LeNet5
from dynarank.optim.steps import take_step

DECAYS, SEEDS, TUNING_SEED = (1, 2, 10), range(10), 100
EPOCHS, RANK, BATCH = 4, 20, 128
STORE = RESULTS / "ill_conditioning.jsonl"


@dataclass(frozen=True)
class Method:
    """How the factors are trained.

    Args:
        title: Its row in the table.
        lrs: Learning rates to choose from, each twice the one before.
        build: Makes the optimizer of a model at a learning rate.
    """

    title: str
    lrs: tuple[float, ...]
    build: Callable[[nn.Module, float], torch.optim.Optimizer]


def manifold(integrator: str) -> Callable[[nn.Module, float], torch.optim.Optimizer]:
    """Return what builds the optimizer of an integrator: fixed ranks, and plain gradient descent for biases."""

    def build(model: nn.Module, lr: float) -> torch.optim.Optimizer:
        return LowRankOptimizer(
            model,
            lr=lr,
            integrator=integrator,
            rank_policy="fixed",
            base=torch.optim.SGD,
            base_options={"lr": 0.05, "momentum": 0.9, "nesterov": True},
        )

    return build


def plain(model: nn.Module, lr: float) -> torch.optim.Optimizer:
    """Gradient descent with Nesterov momentum on the factors; biases as everywhere."""
    factors = [p for layer in low_rank_layers(model).values() for p in (layer.A, layer.B)]
    held = {id(p) for p in factors}
    rest = [p for p in model.parameters() if id(p) not in held]
    groups = [{"params": factors, "lr": lr}, {"params": rest, "lr": 0.05}]
    return torch.optim.SGD(groups, momentum=0.9, nesterov=True)


METHODS = {
    "bug": Method(
        "unconventional BUG (two gradients)", (0.0125, 0.025, 0.05, 0.1, 0.2), manifold("unconventional_bug")
    ),
    "muon": Method("tangent_muon", (0.003125, 0.00625, 0.0125, 0.025, 0.05), manifold("tangent_muon")),
    "gauge_fixed": Method("gauge_fixed_muon", (0.003125, 0.00625, 0.0125, 0.025, 0.05), manifold("gauge_fixed_muon")),
    "plain": Method("plain U V^T, momentum 0.9", (0.0125, 0.025, 0.05, 0.1, 0.2), plain),
}


@dataclass(frozen=True)
class Job:
    """One run; on the tuning seed it is a trial."""

    method: str
    decay: int
    lr: float
    seed: int


def execute(job: Job) -> dict[str, Any]:
    """Train a network and return its accuracies."""
    torch.set_num_threads(1)
    torch.manual_seed(job.seed)
    model, method, splits = start(job.decay), METHODS[job.method], load_mnist()
    optimizer = method.build(model, job.lr)
    generator = torch.Generator().manual_seed(job.seed)
    batches = Batches(splits.train_inputs, splits.train_targets, BATCH, generator)
    curve = []
    for _ in range(EPOCHS):
        try:
            for _ in range(batches.steps_per_epoch):
                inputs, targets = batches.next_batch()

                def closure(inputs: torch.Tensor = inputs, targets: torch.Tensor = targets) -> torch.Tensor:
                    optimizer.zero_grad()
                    loss = cross_entropy(model(inputs), targets)
                    loss.backward()
                    return loss.detach()

                take_step(optimizer, closure)
        except NonFiniteGradientError:
            return {"diverged": True, "validation": 0.0, "test": 0.0, "curve": curve}
        curve.append(accuracy(model, *splits.part("validation")))
    test = accuracy(model, *splits.part("test")) if job.seed != TUNING_SEED else None
    return {"validation": curve[-1], "test": test, "curve": curve}


def start(decay: int) -> nn.Module:
    """Return the network with decaying singular values, in the balanced gauge: ``A = sigma^1/2 U^T`` and so on."""
    model = LeNet5()
    options: Any = {"include_head": True, "keep_dense_above_break_even": False}
    factorize_(model, rank=RANK, rank_pattern={"head": 10}, **options)
    for layer in low_rank_layers(model).values():
        at = layer.factors()
        sigma = at.sigma.double() / float(decay) ** torch.arange(at.rank, dtype=torch.float64)
        root = sigma.sqrt().float().unsqueeze(-1)
        layer.set_factors(FactorPair(root * at.U.mT, root * at.V.mT))
    return model


def accuracy(model: nn.Module, inputs: torch.Tensor, targets: torch.Tensor) -> float:
    """Return the part classified correctly; a network that holds NaN classifies nothing."""
    return float(classification_quality(model, inputs, targets, batch_size=1000).accuracy or 0.0)


def tuned(workers: int) -> dict[tuple[str, int], float]:
    """Return the learning rate of every method and decay: the best on validation images with the extra seed."""
    trials = [Job(m, d, lr, TUNING_SEED) for m in METHODS for d in DECAYS for lr in METHODS[m].lrs]
    rows = perform(trials, STORE, script=__file__, workers=workers)
    best: dict[tuple[str, int], Job] = {}
    for job in trials:
        rival = best.get((job.method, job.decay))
        if rival is None or rows[key_of(job)]["validation"] > rows[key_of(rival)]["validation"]:
            best[job.method, job.decay] = job
    return {cell: job.lr for cell, job in best.items()}


def page(rates: dict[tuple[str, int], float], rows: list[dict[str, Any]]) -> str:
    """Return the table as Markdown."""
    lines = [
        "| singular values / | method | lr | epoch 1 | epoch 2 | epoch 4 | test | median | worst |",
        "|---" * 9 + "|",
    ]
    for decay in DECAYS:
        for name, method in METHODS.items():
            own = [row for row in rows if (row["method"], row["decay"]) == (name, decay)]
            curves = [[100 * value for value in row["curve"]] for row in own if not row.get("diverged")]
            tests = [100 * row["test"] for row in own]
            epochs = [spread([curve[i] for curve in curves]) for i in (0, 1, 3)]
            lost = len(own) - len(curves)
            title = method.title + (f" ({lost} of {len(own)} diverged)" if lost else "")
            edge = " (edge)" if rates[name, decay] in (method.lrs[0], method.lrs[-1]) else ""
            rate, ends = f"{rates[name, decay]:g}{edge}", (statistics.median(tests), min(tests))
            cells = [f"{decay}^k", title, rate, *epochs, spread(tests), *(f"{value:.2f}" for value in ends)]
            lines.append(f"| {' | '.join(cells)} |")
    seeds = len({row["seed"] for row in rows})
    _, command, text = (__doc__ or "").split("\n\n", 2)
    note = "Epochs: accuracy on validation images in percent, mean ± standard deviation over seeds 0 to"
    edge = "lr marked as edge is the smallest or largest that was tried."
    head = f"# Small singular values at the start\n\n`{command.strip()}`\n\n{text}\n{note} {seeds - 1}; {edge}"
    return "\n\n".join([head, "\n".join(lines)]) + "\n"


def spread(values: list[float]) -> str:
    """Return mean and standard deviation."""
    return f"{statistics.mean(values):.2f} ± {statistics.stdev(values):.2f}" if len(values) > 1 else "-"


def main() -> None:
    """Carry out what is missing and write the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--workers", type=int, default=2, help="processes at a time")
    parser.add_argument("--seeds", type=int, default=len(SEEDS), help="how many")
    parser.add_argument("--job", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.job:
        print(json.dumps(execute(Job(**json.loads(options.job)))))
        return
    rates = tuned(options.workers)
    jobs = [Job(m, d, rates[m, d], seed) for seed in SEEDS[: options.seeds] for d in DECAYS for m in METHODS]
    rows = perform(jobs, STORE, script=__file__, workers=options.workers)
    (RESULTS / "ill_conditioning.md").write_text(page(rates, list(rows.values())))


if __name__ == "__main__":
    main()
