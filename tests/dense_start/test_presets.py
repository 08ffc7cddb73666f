"""OIALR, Pufferfish and Cuttlefish by name, with bases that stay or move on, and interrupted on the way."""

import copy
import gc
import io
import weakref
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim.lr_scheduler import CosineAnnealingLR

from dynarank.dense_start.cuttlefish import cuttlefish
from dynarank.dense_start.dense_start import DenseStart
from dynarank.dense_start.oialr import oialr
from dynarank.dense_start.pufferfish import pufferfish
from dynarank.events import RankEvent
from dynarank.factorize import factorize_
from dynarank.layers.base import low_rank_layers
from dynarank.optim.low_rank_optimizer import LowRankOptimizer
from dynarank.ranks.base import AbstractRankPolicy, Decision, LayerSpectrum, PlanContext
from dynarank.ranks.fraction import Fraction
from dynarank.ranks.relative_tail import RelativeTail
from dynarank.ranks.sigma_cutoff import SigmaCutoff
from dynarank.schedules.periodic import Periodic
from dynarank.switches.at_step import AtStep
from dynarank.switches.stable_basis import StableBasis

STEPS = 22


class Ranks(AbstractRankPolicy):
    """Rank 4 at first, 6 from step 8 on."""

    def plan(self, spectra: Sequence[LayerSpectrum], context: PlanContext) -> list[Decision]:
        rank, tried = (4, 2) if context.step < 8 else (6, 0)
        return [Decision(min(rank, len(s.sigma)), min(tried, s.max_rank - rank), "scripted") for s in spectra]


def make_model(seed: int = 0, *, bias: bool = True) -> Any:
    """Three layers that could go low-rank, whose singular values fall off, and a head."""
    torch.manual_seed(seed)
    layers = [nn.Linear(m, n, bias) for m, n in ((12, 20), (20, 16), (16, 14), (14, 4))]
    model = nn.Sequential(layers[0], nn.Tanh(), layers[1], nn.Tanh(), layers[2], nn.Tanh(), layers[3]).double()
    for layer in layers[:3]:
        U, sigma, Vh = torch.linalg.svd(layer.weight.detach(), full_matrices=False)
        layer.weight.data.copy_(U * (2 * sigma[0] * 0.5 ** torch.arange(len(sigma))) @ Vh)
    return model


def loss_of(model: nn.Module, step: int) -> Tensor:
    x = torch.randn(16, 12, generator=torch.Generator().manual_seed(step), dtype=torch.float64)
    return nn.functional.cross_entropy(model(x), x[:, :4].argmax(dim=1))


def train(model: nn.Module, optimizer: torch.optim.Optimizer, steps: range) -> list[float]:
    losses = []
    for step in steps:
        optimizer.zero_grad()
        loss = loss_of(model, step)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


def moving(model: nn.Module, **options: Any) -> LowRankOptimizer:
    chosen: dict[str, Any] = {"lr": 0.05, "base": torch.optim.SGD, "base_options": {"lr": 0.05}, "dense_start": True}
    return LowRankOptimizer(model, **(chosen | options))


def assert_same(found: Any, expected: Any) -> None:
    """Assert that two trees agree to the last bit."""
    if isinstance(expected, dict):
        assert list(found) == list(expected)
        found, expected = list(found.values()), list(expected.values())
    if isinstance(expected, list | tuple):
        for one, other in zip(found, expected, strict=True):
            assert_same(one, other)
    else:
        assert torch.equal(found, expected) if isinstance(expected, Tensor) else found == expected


# --- the presets -------------------------------------------------------------------------------------------------


def test_oialr_waits_cuts_by_beta_and_widens_its_window():
    model = make_model()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    start = oialr(model, optimizer, delay=4, every=2, beta=0.1)
    events: list[RankEvent] = []
    start.on_rank_event(events.extend)
    train(model, optimizer, range(3))
    assert start.low_rank == {}
    train(model, optimizer, range(3, 12))
    # The ten per cent of three layers are one; sigma falls by a half, so that four directions are above a tenth.
    assert [(e.step, e.layer, e.old_rank, e.new_rank) for e in events[:3]] == [
        (4, "4", 14, 7),  # at most a half at once
        (6, "4", 7, 4),
        (6, "2", 16, 8),
    ]
    assert {name: (layer.form, layer.rank) for name, layer in start.low_rank.items()} == {
        "4": ("core", 4),
        "2": ("core", 4),
        "0": ("core", 4),
    }


def test_oialr_takes_a_switch_and_a_policy_instead():
    model = make_model()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    switch, policy = AtStep(2), Fraction(0.25)
    start = oialr(model, optimizer, switch=switch, rank_policy=policy, window=None, keep_dense=False)
    assert (start.switch, start.rank_policy, start.every, start.largest_cut) == (switch, policy, 500, 0.5)
    with pytest.raises(TypeError, match="oialr takes delay or switch, got neither"):
        oialr(model, optimizer)
    with pytest.raises(TypeError, match="oialr takes delay or switch, got both"):
        oialr(model, optimizer, delay=3, switch=switch)
    assert oialr(model, optimizer, delay=3, beta=0.3).rank_policy == SigmaCutoff(0.3, largest_cut=1.0)


def test_pufferfish_trains_two_factors_of_a_quarter_of_the_rank():
    model = make_model()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    start = pufferfish(model, optimizer, delay=2, exclude_modules=["0"])
    W = model[2].weight.detach().clone()
    train(model, optimizer, range(3))
    assert {name: (layer.form, layer.rank) for name, layer in start.low_rank.items()} == {
        "4": ("pair", 3),
        "2": ("pair", 4),
    }
    layer: Any = model[2]
    U, sigma, Vh = torch.linalg.svd(W)
    torch.testing.assert_close(layer.A.T @ layer.B, U[:, :4] * sigma[:4] @ Vh[:4], atol=1e-12, rtol=0)
    torch.testing.assert_close(layer.A @ layer.A.T, sigma[:4].diag(), atol=1e-12, rtol=0)
    torch.testing.assert_close(layer.B @ layer.B.T, sigma[:4].diag(), atol=1e-12, rtol=0)


def test_cuttlefish_waits_until_the_stable_ranks_rest():
    model = make_model()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    start = cuttlefish(model, optimizer, every=2)
    switched = None
    for step in range(1, 40):
        train(model, optimizer, range(1))
        switched = switched or (step if start.low_rank else None)
    assert switched == 2 * 16  # the average reaches fifteen looks back
    assert {layer.form for layer in start.low_rank.values()} == {"pair"} and list(start.dense) == []
    for (m, n), layer in zip(((20, 12), (16, 20), (14, 16)), reversed(start.low_rank.values()), strict=True):
        scale, stable = (1 + (min(m, n) / max(m, n)) ** 0.5) ** 2, 4 / 3  # of sigma = 1, 1/2, 1/4, ...
        assert layer.rank == -int(-scale * stable // 1)


# --- bases that move on ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("momentum", [0.0, 0.9])
def test_a_low_rank_optimizer_takes_a_layer_over_as_if_built_with_it(momentum):
    model = make_model()
    optimizer = moving(model, momentum=momentum, schedule=Periodic(every=10**6))
    start = DenseStart(model, optimizer, switch=AtStep(3), rank_policy=Fraction(0.25))
    assert optimizer.layers == {}
    train(model, optimizer, range(3))
    assert list(optimizer.layers) == list(start.low_rank) == ["4", "2", "0"] and start.dense == {}
    twin = copy.deepcopy(model)
    anew = moving(twin, momentum=momentum, schedule=Periodic(every=10**6), dense_start=False)
    layer: Any = model[2]
    before = layer.factors()
    assert train(model, optimizer, range(3, 8)) == train(twin, anew, range(3, 8))
    assert_same(dict(model.state_dict()), dict(twin.state_dict()))
    left = layer.factors().U - before.U @ (before.U.T @ layer.factors().U)
    assert float(left.norm()) > 1e-3  # the basis has moved
    assert_same(dict(optimizer.state[layer.A]), dict(anew.state[twin[2].A]))
    owned = [p for group in optimizer.param_groups for p in group["params"]]
    assert {id(p) for p in owned} == {id(p) for p in model.parameters()} and len(owned) == len({*map(id, owned)})


def test_ranks_grow_again_by_the_policy_of_the_optimizer():
    model = make_model()
    optimizer = moving(model, rank_policy=Ranks(), schedule=Periodic(every=2))
    start = oialr(model, optimizer, delay=3, every=1, rank_policy=Fraction(0.25), window=None, largest_cut=None)
    train(model, optimizer, range(5))
    assert {name: layer.rank for name, layer in start.low_rank.items()} == {"4": 5, "2": 6, "0": 5}  # two are tried
    losses = train(model, optimizer, range(5, 40))
    assert [layer.rank for layer in start.low_rank.values()] == [6, 6, 6] and start.refresh() == []
    assert sum(losses[-5:]) < sum(losses[:5])


def test_a_low_rank_optimizer_may_wait_for_its_first_layer_and_drive_all_that_is_there():
    model = make_model(bias=False)
    with pytest.raises(ValueError, match="found no low-rank layer in the model"):
        LowRankOptimizer(model)
    optimizer = moving(model, schedule=Periodic(every=1), rank_policy=RelativeTail(0.3), nonfinite="skip")
    losses = train(model, optimizer, range(3))
    assert len(losses) == 3 and optimizer.plan_ranks() == {}
    again = moving(make_model(1, bias=False))
    again.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    assert again.steps == 3 and again.layers == {}
    start = DenseStart(
        model, optimizer, switch=AtStep(1), rank_policy=Fraction(0.25), include_head=True, target_modules=["0", "6"]
    )
    train(model, optimizer, range(2))
    assert list(start.low_rank) == ["6", "0"] and [len(g["params"]) for g in optimizer.param_groups] == [4, 2]


def test_low_rank_layers_join_by_add_param_group_without_a_dense_start():
    model = make_model()
    optimizer = moving(model, schedule=Periodic(every=10**6))
    train(model, optimizer, range(1))
    optimizer.param_groups[1]["params"].remove(model[0].weight)
    factorize_(model, rank=3, target_modules=["0"])
    layer: Any = model[0]
    optimizer.add_param_group({"params": [layer.A, layer.B]})
    before = layer.weight.detach()
    train(model, optimizer, range(1, 4))
    assert list(optimizer.layers) == ["0"] and not torch.equal(layer.weight, before)


@pytest.mark.parametrize(
    ("policy", "freeze", "said"), [(RelativeTail(0.3), 3, True), ("fixed", 3, False), (RelativeTail(0.3), 9, False)]
)
def test_ranks_that_froze_before_the_switch_are_named_once(
    policy: Any, freeze: int, said: bool, caplog: pytest.LogCaptureFixture
):
    model = make_model()
    optimizer = moving(model, rank_policy=policy, schedule=Periodic(every=2, freeze=freeze))
    switch = {"switch": AtStep(5), "rank_policy": Fraction(0.25)}
    DenseStart(model, optimizer, **switch, every=1, window=0.4, keep_dense=False)  # two layers join, then one
    train(model, optimizer, range(12))
    assert list(optimizer.layers) == ["4", "2", "0"]
    records = [record.getMessage() for record in caplog.records if record.levelname == "WARNING"]
    assert len(records) == said
    if said:
        assert "step 5: the ranks of 4, 2 are frozen from the start" in records[0]
        assert "RelativeTail" in records[0] and "Periodic(freeze=...) does with a later step" in records[0]


def test_the_optimizer_keeps_a_dense_start_that_nobody_else_holds():
    model = make_model()
    optimizer = sgd(model)
    there = weakref.ref(pufferfish(model, optimizer, delay=2))
    gc.collect()
    assert there() is not None
    train(model, optimizer, range(3))
    assert [layer.rank for layer in low_rank_layers(model).values()] == [3, 4, 3]


# --- interruption ------------------------------------------------------------------------------------------------


def adamw(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.AdamW(model.parameters(), lr=0.01, amsgrad=True)


def sgd(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)


def growing(model: nn.Module) -> torch.optim.Optimizer:
    return moving(model, schedule=Periodic(every=3), rank_policy=RelativeTail(0.2, growth=0.5))


STABLE = {"switch": StableBasis(every=3, delay=2, threshold=0.999), "rank_policy": SigmaCutoff(0.2, largest_cut=1.0)}
RUNS: dict[str, tuple[Callable[..., torch.optim.Optimizer], Callable[..., DenseStart]]] = {
    "oialr": (adamw, lambda m, o: oialr(m, o, delay=4, every=3, window=0.4)),
    "oialr moving": (growing, lambda m, o: oialr(m, o, delay=4, every=3, window=0.4)),
    "transported": (adamw, lambda m, o: DenseStart(m, o, **STABLE, every=2, largest_cut=0.5, state="transported")),
    "pufferfish": (sgd, lambda m, o: pufferfish(m, o, delay=4)),
    "cuttlefish": (adamw, lambda m, o: cuttlefish(m, o, every=1)),
    "cuttlefish at the latest": (adamw, lambda m, o: cuttlefish(m, o, every=2, latest=5)),
}


class Run:
    """A model, its optimizer, its dense start and a scheduler."""

    def __init__(self, name: str, *, seed: int) -> None:
        self.model = make_model(seed)
        make_optimizer, make_start = RUNS[name]
        self.optimizer: Any = make_optimizer(self.model)
        self.start = make_start(self.model, self.optimizer)
        self.scheduler = CosineAnnealingLR(self.optimizer, T_max=STEPS)
        self.parts: list[Any] = [self.start, self.model, self.optimizer, self.scheduler]
        self.events: list[RankEvent] = []
        self.start.on_rank_event(self.events.extend)

    def go(self, steps: range) -> list[float]:
        losses = []
        for step in steps:
            losses += train(self.model, self.optimizer, range(step, step + 1))
            self.scheduler.step()
        return losses

    def saved(self) -> Any:
        file = io.BytesIO()
        torch.save([part.state_dict() for part in self.parts], file)
        file.seek(0)
        return torch.load(file, weights_only=True)


@pytest.mark.parametrize("at", [2, 4, 7, 16])
@pytest.mark.parametrize("name", RUNS)
def test_an_interrupted_run_goes_on_to_the_last_bit(name, at):
    whole = Run(name, seed=0)
    whole.go(range(at))
    states, before = whole.saved(), len(whole.events)
    losses = whole.go(range(at, STEPS))
    assert len(whole.start.low_rank) == 3 and len({event.step for event in whole.events}) > ("fish" not in name)
    resumed = Run(name, seed=1)
    for part, state in zip(resumed.parts, states, strict=True):
        part.load_state_dict(state)
    assert resumed.go(range(at, STEPS)) == losses
    assert resumed.events == whole.events[before:]
    assert_same(resumed.saved(), whole.saved())


def test_layers_join_a_low_rank_optimizer_again_in_the_order_in_which_they_did():
    whole, resumed = Run("oialr moving", seed=0), Run("oialr moving", seed=1)
    whole.go(range(12))
    resumed.start.load_state_dict(whole.start.state_dict())
    assert list(resumed.optimizer.layers) == list(whole.optimizer.layers) == ["4", "2", "0"]
