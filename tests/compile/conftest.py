"""Counting graphs, a policy that gives the ranks a test wants, and one model of each kind."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.backends.common import aot_autograd
from torch._functorch.aot_autograd import make_boxed_func

from dynarank import LowRankOptimizer, factorize_
from dynarank.layers._factored import factored_layers
from dynarank.ranks.base import AbstractRankPolicy, Decision, LayerSpectrum, PlanContext
from dynarank.schedules.periodic import Periodic


class Graphs:
    """A backend that runs what ahead-of-time autograd makes as it is, and counts it."""

    def __init__(self) -> None:
        self.forward = self.backward = self.inference = 0

    def __call__(self, module: Any, inputs: Any) -> Any:
        kinds = {"fw_compiler": "forward", "bw_compiler": "backward", "inference_compiler": "inference"}
        return aot_autograd(**{option: self._counting(kind) for option, kind in kinds.items()})(module, inputs)

    def _counting(self, kind: str) -> Callable[[Any, Any], Any]:
        def compiler(module: Any, inputs: Any) -> Any:
            setattr(self, kind, getattr(self, kind) + 1)
            return make_boxed_func(module.forward)

        return compiler

    @property
    def counts(self) -> tuple[int, int, int]:
        """Graphs for training, forward and backward, and graphs without gradients."""
        return self.forward, self.backward, self.inference


@dataclass(frozen=True)
class Wanted(AbstractRankPolicy):
    """Gives every layer and mode the rank that stands in ``rank``, by cutting or by growing."""

    rank: list[int] = field(default_factory=lambda: [4])

    def plan(self, spectra: Sequence[LayerSpectrum], context: PlanContext) -> list[Decision]:
        decisions = []
        for spectrum in spectra:
            rank, held = min(self.rank[0], spectrum.max_rank), len(spectrum.sigma)
            decisions.append(Decision(min(rank, held), max(rank - held, 0), "wanted"))
        return decisions


class Run:
    """A model in training, compiled or not, whose ranks change when a test says so."""

    def __init__(self, model: nn.Module, x: Tensor, *, backend: Any = None) -> None:
        self.model, self.x = model, x
        self.network = model if backend is None else torch.compile(model, backend=backend)
        self.policy = Wanted()
        self.optimizer = LowRankOptimizer(
            model, lr=0.01, rank_policy=self.policy, schedule=Periodic(1_000_000), base_options={"lr": 1e-3}
        )
        self.losses: list[Tensor] = []

    def steps(self, count: int = 2) -> None:
        for _ in range(count):
            self.optimizer.zero_grad()
            self.loss = (self.network(self.x).double() - 1).square().mean()  # stays alive, as in an ordinary loop
            self.loss.backward()
            self.optimizer.step()
            self.losses.append(self.loss.detach())

    def train_at(self, rank: int) -> None:
        self.policy.rank[0] = rank
        self.optimizer.change_ranks()
        assert self.ranks == {rank}
        self.steps()

    @property
    def ranks(self) -> set[int]:
        return {rank for layer in factored_layers(self.model).values() for rank in layer.all_ranks}

    @property
    def capacities(self) -> set[int]:
        return {size for layer in factored_layers(self.model).values() for size in layer.all_capacities}


@dataclass(frozen=True)
class Case:
    """A dense model, an input, and how it is factorised."""

    build: Callable[[], nn.Module]
    inputs: Callable[[], Tensor]
    options: dict[str, Any] = field(default_factory=dict)

    def start(self, backend: Any = None, *, rank_multiple: int = 16, dtype: torch.dtype = torch.float64) -> Run:
        """Return a run of rank 4 from the same start each time."""
        torch.manual_seed(1)
        model, x = self.build().to(dtype), self.inputs()
        options = {"include_head": True, "keep_dense_above_break_even": False, **self.options}
        factorize_(model, rank=4, rank_multiple=rank_multiple, **options)
        return Run(model, x.to(dtype) if x.is_floating_point() else x, backend=backend)


def mlp(width: int) -> Case:
    return Case(
        lambda: nn.Sequential(nn.Linear(width, width + 8), nn.ReLU(), nn.Linear(width + 8, width)),
        lambda: torch.randn(8, width),
    )


def convolution(channels: int, form: str, **options: Any) -> Case:
    return Case(
        lambda: nn.Sequential(nn.Conv2d(channels, 80, 3, **options), nn.ReLU()),
        lambda: torch.randn(2, channels, 5, 4),
        {"conv_form": form},
    )


def table(width: int) -> Case:
    return Case(
        lambda: nn.Sequential(nn.Embedding(90, width, padding_idx=0), nn.LayerNorm(width)),
        lambda: torch.randint(90, (5, 7)),
        {"target_modules": "embedding"},
    )


CASES = {
    "linear": mlp(40),
    "matrix": convolution(20, "matrix"),
    "spatial": convolution(30, "spatial", bias=False, padding=1),
    "tucker": convolution(20, "tucker"),
    "embedding": table(40),
    "encoder": Case(  # reads the weight of a layer without calling it
        lambda: nn.TransformerEncoderLayer(40, 2, 48, dropout=0.0, batch_first=True), lambda: torch.randn(3, 7, 40)
    ),
}
WIDE = {"linear": mlp(80), "spatial": convolution(30, "spatial", padding="same"), "tucker": convolution(80, "tucker")}


@pytest.fixture(params=CASES.values(), ids=CASES.keys())
def case(request: pytest.FixtureRequest) -> Case:
    """One model of each kind, with layers whose rank can be 16."""
    return request.param


@pytest.fixture(params=WIDE.values(), ids=WIDE.keys())
def wide(request: pytest.FixtureRequest) -> Case:
    """Layers of one, two and three products whose rank can be 64."""
    return request.param


@pytest.fixture
def linear() -> Case:
    """The plainest."""
    return CASES["linear"]


@pytest.fixture
def graphs() -> Iterator[Graphs]:
    """A backend that counts; nothing compiled outlives the test.

    To torch it is a backend of somebody's own, whose weak references to parameters it leaves alone unless told.
    """
    with torch._dynamo.config.patch(invalidate_compile_context_weakrefs=True):
        yield Graphs()
    torch.compiler.reset()
