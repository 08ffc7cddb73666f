"""A transformer with a billion parameters, analysed and compressed to half layer by layer: time and peak memory.

    python experiments/billion.py

Twenty decoder blocks of width 2048 with random weights in float32. Each way runs in a process of its own, so that the
operating system's count of the largest memory a process ever had is that of this way. Memory is given above that of the
finished model: a second copy of the weights would show as their full size.
"""

import argparse
import json
import resource
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from dynarank.compress import Compressor
from dynarank.measure import stored_bytes

RESULTS = Path(__file__).parent / "results"
BUDGET = 0.5
VOCABULARY = 4096
WAYS = ("svd", "activation_aware")
STAGES = {"survey": "analysis", "plan": "plan", "apply": "compression"}
MEMORY = 3 * 2**29  # bytes that moments of inputs may take at a time
LAYERS_WORTH = 5  # in float64: what may be in memory beside the model and beside the moments


class Block(nn.Module):
    """A decoder block without biases: causal attention and a GELU network four times as wide, both before a norm."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.query, self.key, self.value, self.out = (nn.Linear(width, width, bias=False) for _ in range(4))
        self.up, self.down = nn.Linear(width, 4 * width, bias=False), nn.Linear(4 * width, width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """Return the states after the block, ``(sequences, length, width)`` like those before."""
        h = self.norm1(x)
        q, k, v = (f(h).unflatten(-1, (self.heads, -1)).transpose(1, 2) for f in (self.query, self.key, self.value))
        mixed = functional.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.out(mixed.transpose(1, 2).flatten(2))
        return x + self.down(functional.gelu(self.up(self.norm2(x))))


def decoder(blocks: int, width: int, heads: int = 16) -> nn.Sequential:
    """Return a decoder from token numbers to states, with the random weights of torch's initialisation."""
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Embedding(VOCABULARY, width), *(Block(width, heads) for _ in range(blocks)), nn.LayerNorm(width)
    )


def token_batches(count: int, length: int) -> list[Tensor]:
    """Return random token batches of one sequence each."""
    generator = torch.Generator().manual_seed(1)
    return [torch.randint(VOCABULARY, (1, length), generator=generator) for _ in range(count)]


def peak() -> int:
    """Return the largest number of bytes that this process has ever held in memory."""
    return 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss  # Linux counts in KiB


def largest_layer(model: nn.Module) -> int:
    """Return the bytes of the largest weight in float64, the type in which spectra are taken."""
    return max(8 * module.weight.numel() for module in model.modules() if isinstance(module, nn.Linear))


def compress(model: nn.Module, batches: list[Tensor] | None, memory: int) -> dict[str, Any]:
    """Analyse the model and compress it in place; return the seconds and the growth of the peak of each stage."""
    size, layer = stored_bytes(model), largest_layer(model)
    started = peak()
    found: dict[str, Any] = {"bytes_before": size, "largest_layer": layer}

    def timed(name: str, work: Callable[[], Any]) -> Any:
        began, worked = time.monotonic(), time.process_time()
        result = work()
        seconds, busy = time.monotonic() - began, time.process_time() - worked
        found[name] = {"seconds": seconds, "busy": busy, "above_model": peak() - started}
        print(name, found[name], file=sys.stderr, flush=True)
        return result

    options = {"calibration": batches, "measured_sensitivity": False, "include_head": True, "memory": memory}
    compressor = timed("survey", lambda: Compressor(model, **options))
    plan = timed("plan", lambda: compressor.plan(BUDGET))
    report = timed("apply", lambda: compressor.apply_(plan))
    errors = [entry.error for entry in report.compressed]
    return found | {
        "layers": len(report.compressed),
        "parameters_before": report.parameters_before,
        "parameters_after": report.parameters_after,
        "mean_error": sum(errors) / len(errors),
        "bytes_after": stored_bytes(model),
        "peak": peak(),
    }


def run(way: str, arguments: argparse.Namespace) -> dict[str, Any]:
    """Build the model, compress it in one way and check that there never was a second copy of it."""
    model = decoder(arguments.blocks, arguments.width).eval()
    batches = token_batches(arguments.batches, arguments.length) if way == "activation_aware" else None
    found = compress(model, batches, MEMORY)
    check(found, MEMORY if batches else 0)
    return found


def check(found: dict[str, Any], memory: int) -> None:
    """Refuse a peak above a few layers in float64 and twice the memory for moments: sums, and the means of them."""
    allowed = LAYERS_WORTH * found["largest_layer"] + 2 * memory
    above = found["apply"]["above_model"]
    if above >= allowed:
        raise RuntimeError(f"the peak is {above:,} bytes above the model, but {allowed:,} are allowed.")
    if allowed >= found["bytes_before"]:
        raise RuntimeError(f"{allowed:,} bytes are allowed: a second copy of {found['bytes_before']:,} would not show.")


def in_a_process(way: str, arguments: argparse.Namespace) -> dict[str, Any]:
    """Return what ``run`` finds in a process of its own."""
    command = [sys.executable, __file__, "--only", way]
    for name in ("threads", "blocks", "width", "batches", "length"):
        command += [f"--{name}", str(getattr(arguments, name))]
    return json.loads(subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout)


def table(results: dict[str, dict[str, Any]]) -> str:
    """Return a Markdown table: one row for each stage of each way."""
    lines = [
        "| way | parameters | weights, GB | stage | CPU seconds | seconds | peak above the model, GB |",
        "|---|---|---|---|---|---|---|",
    ]
    for way, found in results.items():
        whole = (
            way,
            f"{found['parameters_before']:,} to {found['parameters_after']:,}",
            f"{found['bytes_before'] / 1e9:.2f} to {found['bytes_after'] / 1e9:.2f}",
        )
        for index, (stage, name) in enumerate(STAGES.items()):
            part = found[stage]
            numbers = (f"{part['busy']:.0f}", f"{part['seconds']:.0f}", f"{part['above_model'] / 1e9:.2f}")
            lines.append(f"| {' | '.join((*(whole if index == 0 else ('', '', '')), name, *numbers))} |")
    return "\n".join(lines)


def main() -> None:
    """Measure both ways and write the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--blocks", type=int, default=20)
    parser.add_argument("--width", type=int, default=2048)
    parser.add_argument("--batches", type=int, default=4)
    parser.add_argument("--length", type=int, default=512)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--only", choices=WAYS)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    if arguments.only:
        print(json.dumps(run(arguments.only, arguments)))
        return
    results = {way: in_a_process(way, arguments) for way in WAYS}
    layer = next(iter(results.values()))["largest_layer"]
    note = (
        f"{__doc__.split(chr(10) * 2, 2)[2].strip()} The largest layer takes {layer / 1e6:.0f} MB in float64, in which "
        f"spectra are taken. With calibration, {arguments.batches} batches of {arguments.length} random tokens go "
        f"through the model as often as the moments need: they may take {MEMORY / 1e9:.1f} GB at a time, and one layer "
        f"of {4 * arguments.width} inputs takes {8 * (4 * arguments.width) ** 2 / 1e6:.0f} MB. Threads: "
        f"{arguments.threads}, on a machine with other work, which CPU seconds leave out. torch "
        f"{torch.__version__}, {torch.backends.cpu.get_cpu_capability()}."
    )
    text = f"# A billion parameters\n\n`python experiments/billion.py`\n\n{table(results)}\n\n{note}\n"
    (RESULTS / "billion.md").write_text(text)
    print(text)


if __name__ == "__main__":
    main()
