"""What a training step costs in transformers of one and of seven billion parameters, from one block of each.

    python experiments/scale.py --parts 1B
    python experiments/scale.py --parts 7B
    python experiments/scale.py --parts axes

A block is like Llama's, without rotary embeddings: RMSNorm, causal attention, a gated network, no biases. It trains in
float32 on one sequence of 512 tokens: dense with AdamW, as two factors with AdamW, and as low-rank layers with
`LowRankOptimizer`, whose ranks stay, at a quarter and at an eighth of the width. Factors are random.

Bytes are predicted by `memory_report` and, for the block of the 1B model, measured on a real step. Times are CPU times
of one thread, all methods of a table in turn, with their quartiles. Each part is kept in a .json file, and the table is
made of all parts that are there.
"""

import argparse
import json
import math
import resource
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from dynarank import Fixed, LowRankOptimizer, factorize_
from dynarank.layers.base import low_rank_layers
from dynarank.measure import StepMemory, Timing, interleaved, training_memory
from dynarank.memory import memory_report

RESULTS = Path(__file__).parent / "results"
SHARES = (4, 8)  # the width divided by the rank
DENSE = "dense, AdamW"
FACTORS = "plain factors, AdamW"


@dataclass(frozen=True)
class Shape:
    """The shape of a decoder and of the batch that it trains on."""

    width: int
    hidden: int
    heads: int
    layers: int
    tokens: int = 512
    vocabulary: int = 32_000

    def divided(self, by: int) -> "Shape":
        """Return the shape with all widths divided; then, to try the script, with fewer layers too."""
        sizes = {"width": self.width // by, "hidden": self.hidden // by, "vocabulary": self.vocabulary // by}
        return replace(self, **sizes, layers=min(self.layers, 3 if by > 1 else self.layers))


@dataclass(frozen=True)
class Method:
    """A way to train: dense without a rank, plain factors without an integrator."""

    rank: int | None = None
    integrator: str | None = None

    def label(self, width: int) -> str:
        """Return what the method is called in a table."""
        if self.rank is None:
            return DENSE
        return f"{self.integrator or FACTORS}, rank {self.rank} (d/{width / self.rank:g})"


SHAPES = {"1B": Shape(2048, 5504, 16, 24), "7B": Shape(4096, 11008, 32, 32)}
BASE = Shape(512, 1376, 8, 1, tokens=512)
AXES: dict[str, tuple[tuple[int, ...], Callable[[int], tuple[Shape, int]]]] = {
    "width, rank width/4": (
        (256, 512, 1024),
        lambda n: (replace(BASE, width=n, hidden=43 * n // 16, heads=n // 64), n // 4),
    ),
    "depth": ((1, 2, 4), lambda n: (replace(BASE, layers=n), BASE.width // 4)),
    "rank": ((32, 64, 128), lambda n: (BASE, n)),
    "tokens": ((128, 512, 2048), lambda n: (replace(BASE, tokens=n), BASE.width // 4)),
}


class Block(nn.Module):
    """A decoder block without biases: causal attention and a gated network, both after a norm."""

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        width, hidden, self.heads = shape.width, shape.hidden, shape.heads
        self.norm1, self.norm2 = nn.RMSNorm(width), nn.RMSNorm(width)
        self.query, self.key, self.value, self.out = (nn.Linear(width, width, bias=False) for _ in range(4))
        self.gate, self.up = (nn.Linear(width, hidden, bias=False) for _ in range(2))
        self.down = nn.Linear(hidden, width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """Return the states after the block, ``(sequences, length, width)`` like those before."""
        h = self.norm1(x)
        q, k, v = (f(h).unflatten(-1, (self.heads, -1)).transpose(1, 2) for f in (self.query, self.key, self.value))
        mixed = functional.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.out(mixed.transpose(1, 2).flatten(2))
        h = self.norm2(x)
        return x + self.down(functional.silu(self.gate(h)) * self.up(h))


def stack(shape: Shape, layers: int) -> nn.Sequential:
    """Return blocks alone, without memory."""
    with torch.device("meta"):
        return nn.Sequential(*(Block(shape) for _ in range(layers)))


def decoder(shape: Shape, layers: int) -> nn.Sequential:
    """Return a decoder from token numbers to logits, without memory."""
    width, vocabulary = shape.width, shape.vocabulary
    with torch.device("meta"):
        head = nn.Linear(width, vocabulary, bias=False)
        return nn.Sequential(nn.Embedding(vocabulary, width), *stack(shape, layers), nn.RMSNorm(width), head)


def factorised(model: nn.Module, method: Method, *, head: bool) -> nn.Module:
    """Factorise a model in place at the rank of the method, above break-even too, and return it."""
    if method.rank is not None:
        factorize_(model, rank=method.rank, include_head=head, keep_dense_above_break_even=False)
    return model


def optimizer_for(model: nn.Module, method: Method) -> torch.optim.Optimizer:
    """Return the optimizer of the method."""
    if method.integrator is None:
        return torch.optim.AdamW(model.parameters(), lr=1e-4)
    options = {"lr": 1e-4, "rank_policy": Fixed(), "base_options": {"lr": 1e-4}}
    return LowRankOptimizer(model, integrator=method.integrator, **options)


def square(outputs: Tensor, batch: Tensor) -> Tensor:
    """Return a loss that costs nothing to speak of."""
    return outputs.square().mean()


def with_values(model: nn.Module) -> nn.Module:
    """Give a model memory and random values, without the decompositions of dense weights."""
    model = model.to_empty(device="cpu")
    for module in model.modules():
        if not list(module.children()) and hasattr(module, "reset_parameters"):
            low_rank = module in low_rank_layers(model).values()
            module.randomise_(module.all_ranks) if low_rank else module.reset_parameters()  # type: ignore[operator]
    return model


def stepper(model: nn.Module, optimizer: torch.optim.Optimizer, x: Tensor) -> Callable[[], None]:
    """Return a function that takes one training step; methods that wait for their turn hold no gradients."""

    def step() -> None:
        square(model(x), x).backward()
        optimizer.step()
        optimizer.zero_grad()

    return step


def predicted(shape: Shape, method: Method) -> StepMemory:
    """Return the bytes of a step of the blocks alone."""
    model = factorised(stack(shape, shape.layers), method, head=True)
    x = torch.empty(1, shape.tokens, shape.width, device="meta")
    return memory_report(model, optimizer_for(model, method), x, loss=square)


def whole(shape: Shape, method: Method, layers: int) -> StepMemory:
    """Return the bytes of a step of a decoder, its embedding and its head dense."""
    model = factorised(decoder(shape, layers), method, head=False)
    tokens = torch.empty(1, shape.tokens, dtype=torch.int64, device="meta")
    loss = lambda logits, batch: functional.cross_entropy(logits.flatten(0, 1), batch.flatten())  # noqa: E731
    return memory_report(model, optimizer_for(model, method), tokens, loss=loss)


def timed(shape: Shape, methods: list[Method], rounds: int, *, measure: bool) -> tuple[dict[str, Timing], list[int]]:
    """Return the CPU seconds of a step of each method, in turn, and the measured peaks of their memory."""
    calls, peaks = {}, []
    x = torch.randn(1, shape.tokens, shape.width)
    for method in methods:
        model = with_values(factorised(stack(shape, shape.layers), method, head=True))
        optimizer = optimizer_for(model, method)
        if measure:
            peaks.append(training_memory(model, optimizer, x, loss=square).peak)
        calls[method.label(shape.width)] = stepper(model, optimizer, x)
    # To find that a step is long enough to be timed takes one step, which makes the state of the optimizer.
    return interleaved(calls, rounds=rounds, warmup=0, clock="cpu"), peaks


def methods_at(ranks: list[int], integrators: list[str]) -> list[Method]:
    """Return all methods at the given ranks, dense first."""
    return [Method(), *(Method(rank, integrator) for rank in ranks for integrator in (None, *integrators))]


def of_shape(shape: Shape, integrators: list[str], rounds: int, *, measure: bool) -> dict[str, Any]:
    """Return what one block takes, and what whole models of one, two and all blocks take."""
    methods = methods_at([shape.width // share for share in SHARES], integrators)
    block = replace(shape, layers=1)
    followed = (Method(), Method(shape.width // SHARES[0], integrators[0]))  # as a whole: half a minute for 7B
    rows = []
    for method in methods:
        memory = predicted(block, method).as_dict()
        memory.pop("layers")
        counts = (1, 2, shape.layers) if method in followed else (1, 2)
        stages = {str(count): whole(shape, method, count).peak for count in counts}
        rows.append({"method": method.label(shape.width), "memory": memory, "whole": stages, "layers": shape.layers})
        print(rows[-1], flush=True)
    timings, peaks = timed(block, methods, rounds, measure=measure)
    for index, row in enumerate(rows):
        row |= {"timing": vars(timings[row["method"]]), "measured": peaks[index] if peaks else None}
    return {"shape": vars(shape), "rows": rows, "process": 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss}


def of_axes(by: int, integrators: list[str], rounds: int) -> dict[str, Any]:
    """Return the exponents with which time and peak memory grow along each axis."""
    found: dict[str, Any] = {}
    for axis, (values, at) in AXES.items():
        points: dict[str, list[tuple[Timing, int]]] = {}
        for value in values:
            shape, rank = at(value)
            shape, rank = shape.divided(by), rank // by
            methods = methods_at([rank], integrators)
            timings, _ = timed(shape, methods, rounds, measure=False)
            for method in methods:
                point = (timings[method.label(shape.width)], predicted(shape, method).peak)
                points.setdefault(method.integrator or (FACTORS if method.rank else DENSE), []).append(point)
        found[axis] = {"values": values, "methods": {name: exponents(values, own) for name, own in points.items()}}
        print(axis, found[axis], flush=True)
    return found


def exponents(values: tuple[int, ...], points: list[tuple[Timing, int]]) -> dict[str, Any]:
    """Return the slopes of log time and log peak, and those of time that the quartiles at both ends allow."""
    first, last, reach = points[0][0], points[-1][0], math.log(values[-1] / values[0])
    return {
        "time": slope(values, [timing.median for timing, _ in points]),
        "low": math.log(last.low / first.high) / reach,
        "high": math.log(last.high / first.low) / reach,
        "memory": slope(values, [peak for _, peak in points]),
        "seconds": [timing.median for timing, _ in points],
    }


def slope(xs: tuple[int, ...], ys: list[Any]) -> float:
    """Return the exponent ``p`` of ``y = c x^p`` in least squares of the logarithms."""
    a, b = ([math.log(value) for value in values] for values in (xs, ys))
    mean_a, mean_b = sum(a) / len(a), sum(b) / len(b)
    products = sum((x - mean_a) * (y - mean_b) for x, y in zip(a, b, strict=True))
    return products / sum((x - mean_a) ** 2 for x in a)


# --- tables ----------------------------------------------------------------------------------------------------------


def markdown(head: tuple[str, ...], rows: list[tuple[str, ...]]) -> str:
    """Return a Markdown table."""
    return "\n".join(f"| {' | '.join(row)} |" for row in (head, ("---",) * len(head), *rows))


def shape_tables(name: str, found: dict[str, Any]) -> str:
    """Return the tables of one block and of the whole model."""
    shape, rows = Shape(**found["shape"]), found["rows"]
    parts = ("weights", "gradients", "optimizer_state", "activations", "update_temporaries", "peak")
    block, model = [], []
    for row in rows:
        memory, time, measured = row["memory"], row["timing"], row["measured"]
        seconds = f"{time['median']:.2f} ({time['low']:.2f}-{time['high']:.2f})"
        real = f"{measured / 1e6:,.1f} ({memory['peak'] / measured:.3f})" if measured else "-"
        ratio = f"{time['median'] / rows[0]['timing']['median']:.2f}"
        block.append((row["method"], *(f"{memory[part] / 1e6:,.1f}" for part in parts), real, seconds, ratio))
        one, two = (row["whole"][str(count)] / 1e9 for count in (1, 2))
        all_ = row["whole"].get(str(shape.layers))
        sums = f"{one:.3f} + {shape.layers - 1} x {two - one:.3f} = {one + (shape.layers - 1) * (two - one):.2f}"
        times = f"{shape.layers} x {time['median']:.2f} = {shape.layers * time['median']:.0f}"
        model.append((row["method"], sums, f"{all_ / 1e9:.2f}" if all_ else "-", times))
    names = [part.replace("_", " ").replace("update", "step's") for part in parts]
    head = ("one block, MB", *names, "measured peak (predicted / measured)", "CPU s a step (quartiles)", "to dense")
    whole_head = ("whole model, GB", "one block + others = peak", "followed as a whole", "CPU s a step, blocks alone")
    text = (
        f"## {name}: width {shape.width}, gated network {shape.hidden}, {shape.heads} heads, {shape.layers} layers, "
        f"{shape.tokens} tokens\n\n{markdown(head, block)}\n\nThe largest memory the process ever had, with all "
        f"methods alive at once: {found['process'] / 1e9:.1f} GB. {rows[0]['timing']['rounds']} rounds.\n\n"
    )
    note = f"Embedding and head of {shape.vocabulary:,} tokens are dense with AdamW and in the first block's number."
    return f"{text}{markdown(whole_head, model)}\n\n{note}"


def axis_table(found: dict[str, Any]) -> str:
    """Return the table of exponents."""
    rows = []
    for axis, part in found.items():
        for method, own in part["methods"].items():
            time = f"{own['time']:.2f} ({own['low']:.2f} to {own['high']:.2f})"
            seconds = ", ".join(f"{value:.3f}" for value in own["seconds"])
            rows.append((axis, ", ".join(map(str, part["values"])), method, time, f"{own['memory']:.2f}", seconds))
    head = ("axis", "values", "method", "exponent of CPU time (from quartiles)", "exponent of peak memory", "CPU s")
    return (
        "## How the cost grows\n\nBlocks of width 512, gated network 1376, 8 heads, depth 1, 512 tokens, rank 128, but "
        f"for the axis.\n\n{markdown(head, rows)}"
    )


def write(results: dict[str, Any], command: str, folder: Path) -> None:
    """Keep the parts and write the page of all that are there."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "scale.json").write_text(json.dumps(results, indent=1) + "\n")
    parts = [shape_tables(name, results[name]) for name in SHAPES if name in results]
    parts += [axis_table(results["axes"])] if "axes" in results else []
    note = " ".join((__doc__ or "").split("\n\n", 2)[2].split())
    machine = f"One thread, torch {torch.__version__}, {torch.backends.cpu.get_cpu_capability()}, float32."
    text = f"# The cost of a step at scale\n\n`{command}`\n\n" + "\n\n".join(parts) + f"\n\n{note} {machine}\n"
    (folder / "scale.md").write_text(text)
    print(text)


def main() -> None:
    """Measure the parts that are asked for and write the page."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--parts", nargs="+", choices=[*SHAPES, "axes"], default=[*SHAPES, "axes"])
    parser.add_argument("--integrators", nargs="+", default=["gauge_fixed", "gauge_fixed_muon", "tangent_muon"])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--tiny", action="store_true", help="widths divided by 16, three layers: to try the script")
    parser.add_argument("--out", type=Path, default=RESULTS)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    kept = arguments.out / "scale.json"
    results = json.loads(kept.read_text()) if kept.exists() else {}
    by = 16 if arguments.tiny else 1
    for part in arguments.parts:
        if part == "axes":
            results[part] = of_axes(by, arguments.integrators, arguments.rounds)
        else:
            shape = SHAPES[part].divided(by)
            results[part] = of_shape(shape, arguments.integrators, arguments.rounds, measure=part == "1B")
    options = f"--rounds {arguments.rounds} --integrators {' '.join(arguments.integrators)}"
    write(results, f"python experiments/scale.py {options}{' --tiny' if arguments.tiny else ''}", arguments.out)


if __name__ == "__main__":
    main()
