"""The micro-benchmark: single layers of a few shapes, dense and low-rank, timed in turn."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from functools import partial
from math import ceil
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from dynarank.cost_model.work import Form, Kind, Purpose, Work
from dynarank.layers.conv2d import LowRankConv2d
from dynarank.layers.linear import LowRankLinear
from dynarank.measure import interleaved

FRACTIONS = (0.125, 0.5, 0.8)  # of mn / (m + n): a power of two for square layers, and a rank that is none
ENOUGH = 5e7  # multiplications that a call takes at least, by repeats: then it mostly reads its weight from a cache
MOST_REPEATS = 16
LINEAR = (
    *((64, 64), (128, 128), (256, 256), (512, 512), (1024, 1024), (2048, 2048), (4096, 4096)),
    *((10, 512), (64, 512), (512, 64), (256, 1024), (1024, 256), (2048, 512), (512, 2048)),
)
LINEAR_HELD_OUT = ((96, 192), (384, 384), (300, 784), (768, 192), (192, 768), (1536, 384), (3072, 768))
ROWS = (8, 64, 512, 2048, 8192)
# output channels, input channels, side of the kernel, side of the map, batch
CONV2D = (
    *((16, 16, 3, 8, 1), (64, 64, 3, 4, 1), (128, 64, 3, 8, 1), (16, 3, 3, 32, 4), (16, 16, 3, 32, 16)),
    *((32, 32, 3, 16, 4), (32, 32, 3, 16, 32), (64, 64, 3, 8, 8), (64, 64, 3, 16, 16), (64, 64, 1, 8, 32)),
    *((128, 128, 3, 8, 8), (128, 64, 5, 8, 4), (256, 256, 3, 8, 32), (512, 512, 3, 4, 64), (64, 32, 3, 56, 8)),
    (256, 64, 1, 56, 8),
)
CONV2D_HELD_OUT = (
    *((48, 24, 3, 8, 1), (32, 16, 3, 16, 16), (48, 48, 3, 12, 16), (96, 96, 3, 8, 16), (20, 8, 5, 12, 16)),
    (160, 96, 3, 14, 16),
)


class Setting(NamedTuple):
    """A layer and its inputs, at all the ranks at which it is timed."""

    work: Work  # of rank 0
    size: tuple[int, ...]  # of the input
    kernel: int
    held_out: bool

    @property
    def works(self) -> list[tuple[Form, Work]]:
        """The dense layer, and the low-rank ones."""
        ranks = sorted({max(1, round(fraction * self.work.break_even)) for fraction in FRACTIONS})
        return [("dense", self.work), *(("factored", replace(self.work, rank=rank)) for rank in ranks)]

    @property
    def multiplications(self) -> float:
        """In one measurement of everything: training takes three times what inference takes."""
        return 4 * sum(work.multiplications(form) for form, work in self.works)


@dataclass(frozen=True)
class Sample:
    """Seconds of one layer as measured."""

    purpose: Purpose
    form: Form
    work: Work
    seconds: float
    held_out: bool


def settings(kind: Kind) -> list[Setting]:
    """Return what is timed of a kind of layer, the quickest first."""
    found = []
    if kind == "linear":
        for shapes, held_out in ((LINEAR, False), (LINEAR_HELD_OUT, True)):
            works = [Work(kind, shape, 0, rows) for shape in shapes for rows in ROWS]
            found += [Setting(work, (int(work.rows), work.shape[1]), 1, held_out) for work in works]
    else:
        for options, held_out in ((CONV2D, False), (CONV2D_HELD_OUT, True)):
            for m, channels, kernel, side, batch in options:
                work = Work(kind, (m, channels * kernel**2), 0, batch * side**2)
                found.append(Setting(work, (batch, channels, side, side), kernel, held_out))
    return sorted(found, key=lambda setting: setting.multiplications)


def measure(
    chosen: Iterable[Setting], *, device: torch.device, dtype: torch.dtype, seconds: float, min_rounds: int = 3
) -> list[Sample]:
    """Return the median time of every layer of the settings in training and in inference, all interleaved.

    Every layer is called once as its setting is drawn, so that ``chosen`` may end when enough time has gone.
    """
    calls: dict[str, Callable[[], None]] = {}
    found: dict[str, tuple[Purpose, Form, Work, int, bool]] = {}
    for setting in chosen:
        generator = torch.Generator().manual_seed(0)
        x = torch.randn(setting.size, generator=generator).to(device, dtype)
        if setting.work.kind == "conv2d channels last":
            x = x.contiguous(memory_format=torch.channels_last)
        trained = x.detach().clone().requires_grad_()  # keeps its layout
        gradient = x
        for form, work in setting.works:
            layer = _layer(work, form, setting.kernel, generator).to(device, dtype)
            if form == "dense":  # the first one
                with torch.no_grad():
                    gradient = torch.ones_like(layer(x))
            passes: dict[Purpose, Callable[[], None]] = {
                "inference": partial(_infer, layer, x),
                "training": partial(_train, layer, trained, gradient),
            }
            for purpose, call in passes.items():
                name = str(len(calls))
                repeats = min(MOST_REPEATS, ceil(ENOUGH / work.multiplications(form)))
                calls[name] = partial(_repeat, call, repeats)
                calls[name]()  # the first call may be slow
                found[name] = purpose, form, work, repeats, setting.held_out
    # With one thread the time of the processor is that on the wall, less what other processes take.
    alone = device.type == "cpu" and torch.get_num_threads() == 1
    times = interleaved(calls, seconds=seconds, min_rounds=min_rounds, warmup=0, clock="cpu" if alone else "wall")
    return [
        Sample(purpose, form, work, times[name].median / repeats, held_out)
        for name, (purpose, form, work, repeats, held_out) in found.items()
    ]


def _layer(work: Work, form: Form, kernel: int, generator: torch.Generator) -> nn.Module:
    """Return a layer with small random parameters; those of a fresh one would take an SVD."""
    m, n = work.shape
    with torch.device("meta"):
        if work.kind == "linear":
            layer: Any = nn.Linear(n, m) if form == "dense" else LowRankLinear(n, m, rank=work.rank)
        else:
            options: Any = {
                "in_channels": n // kernel**2,
                "out_channels": m,
                "kernel_size": kernel,
                "padding": kernel // 2,
            }
            layer = nn.Conv2d(**options) if form == "dense" else LowRankConv2d(**options, rank=work.rank)
    layer.to_empty(device="cpu")
    for parameter in layer.parameters():
        parameter.data.normal_(std=0.01, generator=generator)
    return layer.to(memory_format=torch.channels_last) if work.kind == "conv2d channels last" else layer


def _infer(layer: nn.Module, x: Tensor) -> None:
    with torch.inference_mode():
        layer(x)


def _train(layer: nn.Module, x: Tensor, gradient: Tensor) -> None:
    """Run a forward and a backward pass, with the gradients of the parameters and of the inputs."""
    torch.autograd.grad(layer(x), [x, *layer.parameters()], gradient)


def _repeat(call: Callable[[], Any], repeats: int) -> None:
    for _ in range(repeats):
        call()
