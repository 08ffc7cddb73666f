"""What a dense start refuses, what it leaves alone, and that a failure changes nothing."""

import copy
import gc
import weakref
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from dynarank.dense_start.dense_start import DenseStart
from dynarank.dense_start.oialr import oialr
from dynarank.factorize import factorize_
from dynarank.optim.low_rank_optimizer import LowRankOptimizer
from dynarank.ranks.base import AbstractRankPolicy, Decision, LayerSpectrum, PlanContext
from dynarank.ranks.fraction import Fraction
from dynarank.switches.at_step import AtStep
from dynarank.switches.base import AbstractSwitch


class Failing(AbstractRankPolicy):
    """A policy that plans a quarter until it is told to fail."""

    fails = True

    def plan(self, spectra: Sequence[LayerSpectrum], context: PlanContext) -> list[Decision]:
        if self.fails:
            raise ArithmeticError("this policy fails")
        return Fraction(0.25 if context.step < 5 else 0.1).plan(spectra, context)


class Nervous(AbstractSwitch):
    """A switch that fails at its second look."""

    def looks(self, step: int) -> bool:
        return True

    def look(self, step: int, weights: Any, state: Any) -> tuple[frozenset[str], Any]:
        if step == 2:
            raise ArithmeticError("this switch fails")
        return frozenset(), state


def make_model(seed: int = 0, width: int = 20) -> Any:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(12, width), nn.Tanh(), nn.Linear(width, 14), nn.Tanh(), nn.Linear(14, 4)).double()


def sgd(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)


def start(model: nn.Module, optimizer: Any = None, **options: Any) -> DenseStart:
    options = {"switch": AtStep(2), "rank_policy": Fraction(0.25)} | options
    return DenseStart(model, optimizer or sgd(model), **options)


def train(model: nn.Module, optimizer: torch.optim.Optimizer, steps: int) -> None:
    for _ in range(steps):
        optimizer.zero_grad()
        model(torch.ones(3, 12).double()).square().sum().backward()
        optimizer.step()


def snapshot(model: nn.Module, optimizer: torch.optim.Optimizer) -> list[Any]:
    """The parameters themselves, and copies of all tensors."""
    held = [id(p) for group in optimizer.param_groups for p in group["params"]]
    tensors = {name: t.clone() for name, t in model.state_dict().items()}
    modules = [id(module) for module in model.modules()]
    return [held, modules, tensors, copy.deepcopy(optimizer.state_dict()["state"])]


def assert_same(found: list[Any], expected: list[Any]) -> None:
    assert found[:2] == expected[:2]
    torch.testing.assert_close(found[2:], expected[2:], atol=0, rtol=0)


# --- options -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"every": 0}, "every must be at least 1, or None for one cut only, got 0"),
        ({"every": 2, "window": 0.0}, "window must be above 0 and at most 1, got 0.0"),
        ({"every": 2, "window": 1.5}, "window must be above 0 and at most 1, got 1.5"),
        ({"window": 0.5}, "window=0.5 needs every"),
        ({"largest_cut": 0.0}, "largest_cut must be above 0 and at most 1, got 0.0"),
        ({"largest_cut": 2}, "largest_cut must be above 0 and at most 1, got 2"),
        ({"trained": "bases"}, "trained must be 'core' or 'factors', got 'bases'"),
        ({"state": "sliced"}, "state must be 'fresh' or 'transported', got 'sliced'"),
        ({"trained": "factors", "state": "transported"}, "state='transported' goes with trained='core'"),
        ({"conv_form": "tucker"}, "conv_form must be 'matrix' or 'spatial' for a dense start, got 'tucker'"),
        ({"conv_form": "tucker4"}, "conv_form must be 'matrix' or 'spatial' for a dense start, got 'tucker4'"),
        ({"conv_form": "depthwise"}, "conv_form 'depthwise'"),
        ({"steps": 2}, r"AtStep\(delay=2\) never looks before the end of a run of 2 steps"),
        ({"target_modules": ["fc7"]}, "target_modules: 'fc7' matches no layer"),
        ({"target_modules": ["0"], "exclude_modules": ["0"]}, r"no layer could go low-rank: 0 \(named in exclude"),
    ],
)
def test_an_option_out_of_range_is_named(options, message):
    model = make_model()
    optimizer = sgd(model)
    before = snapshot(model, optimizer)
    with pytest.raises(ValueError, match=message):
        start(model, optimizer, **options)
    assert_same(snapshot(model, optimizer), before)
    train(model, optimizer, 3)
    assert type(model[0]) is nn.Linear


def test_a_transported_state_is_for_torch_optimizers():
    model = make_model()
    with pytest.raises(ValueError, match="state='transported' goes with trained='core' and a torch optimizer"):
        start(model, LowRankOptimizer(model, dense_start=True), state="transported")


def test_a_switch_within_the_run_is_fine():
    assert start(make_model(), steps=3).steps == 0


# --- models ------------------------------------------------------------------------------------------------------


def test_a_model_with_nothing_to_gain_is_refused_with_the_reasons():
    with pytest.raises(ValueError, match=r"no layer could go low-rank: 0 \(too small.*\), 2 \(classifier head"):
        start(nn.Sequential(nn.Linear(9, 1), nn.Tanh(), nn.Linear(1, 9)))
    with pytest.raises(ValueError, match="no layer could go low-rank: the model has no layer with a low-rank twin"):
        start(nn.Sequential(nn.LayerNorm(4)))
    frozen = make_model()
    frozen[0].requires_grad_(False)
    assert list(start(frozen, include_head=True).candidates) == ["2", "4"]
    frozen.requires_grad_(False)
    with pytest.raises(ValueError, match=r"no layer could go low-rank: 0 \(its weight is frozen\), 2 \(its weight is"):
        start(frozen)
    low = make_model()
    factorize_(low, rank=2)
    with pytest.raises(ValueError, match=r"no layer could go low-rank: 0 \(low-rank already\)"):
        start(low)


def test_a_layer_that_the_optimizer_lacks_is_named():
    model = make_model()
    optimizer = torch.optim.SGD(model[0].parameters(), lr=0.1)
    with pytest.raises(ValueError, match=r"the optimizer \(SGD\) does not hold the weights of 2, so"):
        start(model, optimizer)
    assert list(start(model, optimizer, exclude_modules=["2"]).candidates) == ["0"]


def test_a_wrapped_model_is_refused():
    wrapped = nn.parallel.DistributedDataParallel.__new__(nn.parallel.DistributedDataParallel)
    nn.Module.__init__(wrapped)
    wrapped.module = make_model()
    with pytest.raises(RuntimeError, match="a dense start found DistributedDataParallel"):
        start(wrapped, sgd(wrapped.module))


def test_tied_weights_stay_dense():
    model = make_model()
    model.append(nn.Tanh()).append(nn.Linear(12, 20).double())
    model[6].weight = model[0].weight
    starting = start(model, include_head=True)
    assert list(starting.candidates) == ["2", "4"]


def test_a_model_that_keeps_activations_and_shares_a_layer_can_start():
    class Odd(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first = self.again = nn.Linear(12, 12)
            self.head = nn.Linear(12, 2)
            self.kept: Any = None

        def forward(self, x: Tensor) -> Tensor:
            self.kept = self.first(x)  # such a tensor cannot be copied
            return self.head(self.again(self.kept))

    model = Odd().double()
    model(torch.ones(1, 12).double())
    optimizer = sgd(model)
    starting = start(model, optimizer)
    train(model, optimizer, 3)
    assert list(starting.low_rank) == ["first"] and model.first is model.again
    assert starting.low_rank["first"] is model.first


def test_named_embeddings_may_go_low_rank():
    model = nn.Sequential(nn.Embedding(30, 12), nn.Linear(12, 4)).double()
    optimizer = sgd(model)
    starting = start(model, optimizer, target_modules=["0"])
    for _ in range(4):
        optimizer.zero_grad()
        model(torch.arange(7)).square().sum().backward()
        optimizer.step()
    assert starting.low_rank["0"].rank == 3 and starting.low_rank["0"].form == "core"


def test_it_can_be_let_go():
    model = make_model()
    optimizer = sgd(model)
    starting = start(model, optimizer)
    starting.remove()
    train(model, optimizer, 4)
    assert starting.steps == 0 and starting.low_rank == {}


# --- failures on the way -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("every", [None, 2])
@pytest.mark.parametrize("trained", ["core", "factors"])
def test_a_policy_that_fails_leaves_everything_as_it_was(trained, every):
    model, plain = make_model(), make_model()
    optimizer, alone = sgd(model), sgd(plain)
    policy = Failing()
    starting = start(model, optimizer, rank_policy=policy, trained=trained, every=every)
    before = snapshot(model, optimizer)[:2]
    with pytest.raises(ArithmeticError, match="this policy fails"):
        train(model, optimizer, 2)
    train(plain, alone, 2)
    after = snapshot(model, optimizer)
    assert after[:2] == before
    assert_same(after, [*before, *snapshot(plain, alone)[2:]])
    assert starting.held == {} and starting.low_rank == {}
    policy.fails = False  # the next refresh makes up for it
    train(model, optimizer, 2)
    assert [layer.rank for layer in starting.low_rank.values()] == [3, 3]


def test_a_refresh_that_fails_leaves_low_rank_layers_as_they_were():
    model, plain = make_model(), make_model()
    policies = Failing(), Failing()
    runs = [(m, sgd(m), policy) for m, policy in zip((model, plain), policies, strict=True)]
    for m, optimizer, policy in runs:
        policy.fails = False
        start(m, optimizer, rank_policy=policy, every=3 if m is model else None)
        train(m, optimizer, 4)
    before = snapshot(*runs[0][:2])
    policies[0].fails = True
    with pytest.raises(ArithmeticError):
        train(*runs[0][:2], 1)
    train(*runs[1][:2], 1)
    assert_same(snapshot(*runs[0][:2]), [*before[:2], *snapshot(*runs[1][:2])[2:]])


def test_a_switch_that_fails_leaves_everything_as_it_was():
    model = make_model()
    optimizer = sgd(model)
    before = snapshot(model, optimizer)[:2]
    starting = start(model, optimizer, switch=Nervous())
    with pytest.raises(ArithmeticError, match="this switch fails"):
        train(model, optimizer, 2)
    assert snapshot(model, optimizer)[:2] == before and starting.steps == 2
    train(model, optimizer, 1)


def test_weights_that_are_not_finite_are_named_by_the_svd_and_nothing_changes():
    model = make_model()
    optimizer = sgd(model)
    start(model, optimizer)
    train(model, optimizer, 1)
    model[2].weight.data[0, 0] = float("nan")
    before = snapshot(model, optimizer)[:2]
    with pytest.raises(ValueError, match="NaN or infinity"):
        optimizer.step()
    assert snapshot(model, optimizer)[:2] == before


def test_what_has_come_to_stand_against_a_layer_is_named():
    model = make_model()
    optimizer = sgd(model)
    start(model, optimizer)
    train(model, optimizer, 1)
    handle = model[0].weight.register_hook(lambda gradient: gradient)
    before = snapshot(model, optimizer)[:2]
    with pytest.raises(
        RuntimeError, match=r"0: the layer was to go low-rank now, but .* its weight has gradient hooks"
    ):
        train(model, optimizer, 1)
    assert snapshot(model, optimizer)[:2] == before
    handle.remove()
    train(model, optimizer, 1)
    assert type(model[0]) is not nn.Linear


def test_another_optimizer_that_holds_a_replaced_weight_says_so():
    model = make_model()
    optimizer, other = sgd(model), sgd(model)
    start(model, optimizer)
    train(model, optimizer, 2)
    with pytest.raises(RuntimeError, match=r"still holds weight of '.', which the model no longer uses"):
        other.step()


# --- states that do not fit --------------------------------------------------------------------------------------


def test_a_state_of_another_model_is_refused():
    model = make_model()
    optimizer = sgd(model)
    whole = start(model, optimizer)
    train(model, optimizer, 3)
    state = whole.state_dict()
    for wrong in (
        start(make_model(width=24)),
        start(make_model(), exclude_modules=["0"]),
        start(make_model(), trained="factors"),
    ):
        before = wrong.state_dict()
        with pytest.raises(ValueError, match="the saved state does not fit: it is of other layers or another form"):
            wrong.load_state_dict(state)
        assert wrong.state_dict() == before
    with pytest.raises(ValueError, match="the saved state does not fit: layers are low-rank here already"):
        whole.load_state_dict(state)


def test_no_dense_weight_is_kept_alive():
    model = make_model()
    optimizer = sgd(model)
    starting = start(model, optimizer)
    weight = weakref.ref(model[0].weight)
    train(model, optimizer, 3)
    gc.collect()
    assert starting.low_rank and weight() is None


def test_a_rule_that_never_cuts_far_enough_is_named_once(caplog: pytest.LogCaptureFixture):
    model = nn.Sequential(nn.Linear(20, 30), nn.ReLU(), nn.Linear(30, 20), nn.ReLU(), nn.Linear(20, 3))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    start = oialr(model, optimizer, delay=2, every=1, beta=1e-6, window=None)
    for _ in range(20):
        model(torch.ones(4, 20)).square().mean().backward()
        optimizer.step()
    (record,) = [r for r in caplog.records if r.levelname == "WARNING"]
    assert "every layer is dense still" in record.getMessage()
    assert "0 20 (pays up to 11)" in record.getMessage()
    assert not start.low_rank
