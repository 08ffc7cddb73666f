"""Predicted bytes against those of real steps: as the ledger counts them, and as torch's allocator reports them."""

import copy
import logging
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.profiler import ProfilerActivity, profile
from torch.utils.checkpoint import checkpoint

from dynarank import Fixed, LowRankOptimizer, Periodic, factorize_
from dynarank.layers.linear import LowRankLinear
from dynarank.measure import StepMemory, training_memory
from dynarank.memory import memory_report
from dynarank.models import GPT, LeNet5

PARTS = ("weights", "gradients", "optimizer_state", "activations", "forward_peak", "backward_peak", "update_peak")
DENSE = {"sgd": torch.optim.SGD, "adamw": torch.optim.AdamW}
METHODS = (*DENSE, "factors, adamw", "gauge_fixed_muon", "tangent_heavy_ball", "tangent_muon", "plain_factors")


def cross_entropy(outputs: Tensor, batch: Any) -> Tensor:
    return functional.cross_entropy(outputs.flatten(0, -2), batch[1].flatten())


def mlp() -> tuple[nn.Module, Any]:
    layers = (nn.Linear(196, 301), nn.ReLU(), nn.Linear(301, 99), nn.ReLU(), nn.Linear(99, 10))
    return nn.Sequential(*layers), (torch.randn(32, 196), torch.randint(10, (32,)))


def lenet5() -> tuple[nn.Module, Any]:
    return LeNet5(), (torch.randn(16, 1, 28, 28), torch.randint(10, (16,)))


def gpt(dropout: float = 0.0) -> tuple[nn.Module, Any]:
    tokens = torch.randint(65, (2, 3, 16))
    return GPT(65, layers=1, width=32, context=16, dropout=dropout), (tokens[0].clone(), tokens[1].clone())


def train_with(model: nn.Module, method: str) -> torch.optim.Optimizer:
    """Return the optimizer of a method; all but the dense ones factorise the model first."""
    if method in DENSE:
        return DENSE[method](model.parameters(), lr=1e-3)
    factorize_(model, rank=8)
    if method == "factors, adamw":
        return torch.optim.AdamW(model.parameters(), lr=1e-3)
    return LowRankOptimizer(model, lr=1e-3, integrator=method)


def gradients(model: nn.Module, optimizer: torch.optim.Optimizer, batch: Any) -> None:
    optimizer.zero_grad()
    cross_entropy(model(batch[0]), batch).backward()


def most_allocated(work: Callable[[], None]) -> int:
    """Return by how much ``work`` raises the bytes that torch's allocator has given out, at most."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as record:
        work()

    def events(nodes: Any) -> list[tuple[int, int]]:
        own = [(n.start_time_ns, n.extra_fields.alloc_size) for n in nodes if hasattr(n.extra_fields, "alloc_size")]
        return own + [event for node in nodes for event in events(node.children)]

    live = peak = 0
    for _, size in sorted(events(record.profiler.kineto_results.experimental_event_tree())):  # type: ignore[union-attr]
        live += size
        peak = max(peak, live)
    return peak


@pytest.mark.parametrize("network", [mlp, lenet5, gpt])
@pytest.mark.parametrize("method", METHODS)
def test_the_prediction_is_a_real_step(network: Callable[[], tuple[nn.Module, Any]], method: str):
    model, batch = network()
    optimizer = train_with(model, method)
    predicted = memory_report(model, optimizer, batch, loss=cross_entropy)
    measured = training_memory(model, optimizer, batch, loss=cross_entropy)
    assert measured.activations > 0
    for part in PARTS:
        assert getattr(predicted, part) == pytest.approx(getattr(measured, part), rel=0.02), part
    assert [layer.name for layer in predicted.layers] == [layer.name for layer in measured.layers]
    for _ in range(2):
        gradients(model, optimizer, batch)
        optimizer.step()
    optimizer.zero_grad()
    held = predicted.weights + predicted.optimizer_state
    allocated = held + most_allocated(lambda: gradients(model, optimizer, batch))
    assert max(predicted.forward_peak, predicted.backward_peak) == pytest.approx(allocated, rel=0.1)
    allocated = max(most_allocated(optimizer.step) for _ in range(2))  # type: ignore[arg-type]  # they may take turns
    assert predicted.update_peak == pytest.approx(held + predicted.gradients + allocated, rel=0.1)


def test_parts_counted_by_hand():
    model = nn.Sequential(nn.Linear(20, 30), nn.ReLU(), nn.BatchNorm1d(30), nn.Linear(30, 5, bias=False))
    found = memory_report(model, torch.optim.AdamW(model.parameters()), torch.zeros(7, 20))
    rows = {layer.name: layer for layer in found.layers}
    assert [rows[name].weights for name in ("0", "2", "3")] == [4 * 630, 4 * 120 + 8, 4 * 150]
    assert [rows[name].gradients for name in ("0", "2", "3")] == [4 * 630, 4 * 60, 4 * 150]
    assert [rows[name].optimizer_state for name in ("0", "2", "3")] == [8 * 630 + 8, 8 * 60 + 8, 8 * 150 + 4]
    # Of the first layer nothing is kept: ReLU needs its output alone, and so does the loss, a mean.
    assert [rows[name].activations for name in ("1", "2")] == [4 * 7 * 30, 4 * 7 * 30 + 2 * 4 * 30]
    assert "0" in rows and rows["0"].activations == 0 and "3" in rows and rows["3"].activations == 0
    assert found.total == sum(layer.total for layer in found.layers) <= found.peak + found.activations


def test_low_rank_saves_weights_gradients_and_states_but_no_activations():
    batch, rank = torch.zeros(16, 100), 10
    dense = nn.Sequential(nn.Linear(100, 100, bias=False), nn.Sigmoid(), nn.Linear(100, 100, bias=False), nn.Sigmoid())
    factors = copy.deepcopy(dense)
    before = memory_report(dense, torch.optim.SGD(dense.parameters(), momentum=0.9), batch)
    factorize_(factors, rank=rank, include_head=True)
    after = memory_report(factors, torch.optim.SGD(factors.parameters(), momentum=0.9), batch)
    for part in ("weights", "gradients", "optimizer_state"):
        assert getattr(after, part) == getattr(before, part) * 2 * rank // 100
    assert after.activations == before.activations + 2 * 4 * 16 * rank


def test_a_tied_weight_counts_once():
    model = nn.ModuleDict({"embedding": nn.Embedding(50, 8), "head": nn.Linear(8, 50, bias=False)})
    model["head"].weight = model["embedding"].weight
    found = memory_report(
        model,
        torch.optim.SGD(model.parameters()),
        torch.zeros(3, dtype=torch.int64),
        forward=lambda model, tokens: model["head"](model["embedding"](tokens)),
    )
    assert found.weights == found.gradients == 4 * 400


def test_a_model_larger_than_any_machine_is_predicted_on_the_meta_device():
    with torch.device("meta"):
        model, batch = nn.Sequential(nn.Linear(10**6, 10**6, bias=False)), torch.zeros(2, 10**6)
    factorize_(model, rank=1000, include_head=True)
    found = memory_report(model, LowRankOptimizer(model, integrator="tangent_heavy_ball"), batch)
    assert found.weights == found.gradients == 8 * 10**9
    assert found.optimizer_state == 8 * 10**9 + 4 * 10**6
    assert found.update_peak > 32 * 10**9


def test_a_model_on_the_meta_device_counts_as_one_on_the_cpu():
    model, batch = gpt()
    factorize_(model, rank=8)
    here = memory_report(model, LowRankOptimizer(model), batch, loss=cross_entropy)
    there = model.to("meta")
    batch = [tokens.to("meta") for tokens in batch]
    assert memory_report(there, LowRankOptimizer(there), batch, loss=cross_entropy) == here


class Checkpointed(nn.Module):
    """A module that forgets what it computed and computes it again in the backward pass."""

    def __init__(self, inner: nn.Module, *, reentrant: bool) -> None:
        super().__init__()
        self.inner = inner
        self.reentrant = reentrant

    def forward(self, x: Tensor) -> Tensor:
        return checkpoint(self.inner, x, use_reentrant=self.reentrant)


@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpointed_low_rank_layers_keep_less_for_equal_gradients(reentrant: bool):
    model, batch = gpt(dropout=0.1)
    factorize_(model, rank=8)
    slim = copy.deepcopy(model)
    slim.blocks = nn.Sequential(*(Checkpointed(block, reentrant=reentrant) for block in slim.blocks))
    found = []
    for net in (model, slim):
        optimizer = LowRankOptimizer(net, lr=1e-3)
        predicted = memory_report(net, optimizer, batch, loss=cross_entropy)
        measured = training_memory(net, optimizer, batch, loss=cross_entropy)
        assert predicted.activations == pytest.approx(measured.activations, rel=0.1)
        assert predicted.peak == pytest.approx(measured.peak, rel=0.1)
        found.append(predicted)
        torch.manual_seed(5)
        gradients(net, optimizer, batch)
    assert found[1].activations < 0.2 * found[0].activations
    assert found[1].weights == found[0].weights
    for ours, theirs in zip(slim.parameters(), model.parameters(), strict=True):
        torch.testing.assert_close(ours.grad, theirs.grad)


@pytest.mark.parametrize("look", [memory_report, training_memory])
def test_nothing_is_changed_and_training_goes_on_as_without(look: Callable[..., StepMemory], caplog: Any):
    runs = []
    for ask in (False, True):
        torch.manual_seed(3)
        model, batch = gpt(dropout=0.1)
        factorize_(model, rank=8)
        optimizer = LowRankOptimizer(model, lr=1e-3)
        for _ in range(3):
            gradients(model, optimizer, batch)
            if ask:
                hooks = [len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules()]
                flags = [m.training for m in model.modules()]
                with caplog.at_level(logging.WARNING):
                    look(model, optimizer, batch, loss=cross_entropy)
                assert hooks == [len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules()]
                assert flags == [m.training for m in model.modules()]
            optimizer.step()
        runs.append([*model.parameters(), torch.get_rng_state(), batch[0]])
    assert all(torch.equal(a, b) for a, b in zip(*runs, strict=True))
    assert caplog.messages == []


def test_a_change_of_ranks_is_not_predicted():
    model, batch = mlp()
    factorize_(model, rank=8)
    steady = LowRankOptimizer(model, rank_policy=Fixed())
    restless = LowRankOptimizer(model, schedule=Periodic(every=1))
    assert memory_report(model, restless, batch) == memory_report(model, steady, batch)


def test_the_model_is_taken_in_the_mode_that_it_is_in():
    model, batch = gpt(dropout=0.5)
    optimizer = torch.optim.SGD(model.parameters())
    training = memory_report(model, optimizer, batch, loss=cross_entropy)
    assert memory_report(model.eval(), optimizer, batch, loss=cross_entropy).activations < training.activations


def test_half_precision_halves_weights_and_gradients_alone():
    model = LowRankLinear(64, 32, rank=4, bias=False)
    whole = memory_report(model, LowRankOptimizer(model), torch.zeros(9, 64))
    model = model.bfloat16()
    half = memory_report(model, LowRankOptimizer(model), torch.zeros(9, 64, dtype=torch.bfloat16))
    assert 2 * half.weights == whole.weights
    assert half.optimizer_state == whole.optimizer_state + 2 * half.weights  # float32 masters


def test_the_own_loss_of_the_outputs_is_taken():
    class Outputs:
        def __init__(self, loss: Tensor) -> None:
            self.loss = loss

    model, x = nn.Linear(6, 5), torch.zeros(4, 6)
    optimizer = torch.optim.SGD(model.parameters())
    expected = memory_report(model, optimizer, x, loss=lambda outputs, batch: outputs.exp().sum())
    for wrap in (Outputs, lambda loss: {"loss": loss}):
        found = memory_report(model, optimizer, x, forward=lambda model, x, wrap=wrap: wrap(model(x).exp().sum()))
        assert found.activations == expected.activations > 0


def test_the_table_names_the_largest_layers_and_the_peaks():
    model, batch = gpt()
    found = memory_report(model, torch.optim.AdamW(model.parameters()), batch, loss=cross_entropy)
    lines = str(found).splitlines()
    assert len({len(line) for line in lines[:-1]}) == 1
    assert any(line.startswith("blocks.0.up ") for line in lines) and " others " in lines[-3]
    assert lines[-2].split()[-1] == f"{found.total / 1e6:.3f}"
    assert lines[-1].startswith(f"peak {found.peak / 1e6:.3f} MB: forward ")
    assert found.as_dict()["peak"] == found.peak and len(found.as_dict()["layers"]) == len(found.layers)


@pytest.mark.parametrize("look", [memory_report, training_memory])
def test_bad_input_is_named(look: Callable[..., StepMemory]):
    model, x = nn.Linear(6, 5), torch.zeros(4, 6)
    optimizer = torch.optim.SGD(model.parameters())
    with pytest.raises(ValueError, match=r"a batch of shape \(4, 7\) does not fit the model"):
        look(model, optimizer, torch.zeros(4, 7))
    with pytest.raises(TypeError, match=r"a batch must be a tensor, .* got str"):
        look(model, optimizer, "tokens")
    with pytest.raises(ValueError, match=r"SGD holds no parameter of the model\. Build the optimizer after"):
        look(nn.Linear(6, 5), optimizer, x)
    with pytest.raises(TypeError, match=r"optimizer must be a torch.optim.Optimizer, got type"):
        look(model, torch.optim.SGD, x)
    with pytest.raises(ValueError, match="LBFGS takes several gradients a step"):
        look(model, torch.optim.LBFGS(model.parameters()), x)
    with pytest.raises(ValueError, match=r"loss must return a tensor of one number with a gradient, got \(4, 5\)"):
        look(model, optimizer, x, loss=lambda outputs, batch: outputs)
    with pytest.raises(TypeError, match="outputs of type tuple have no mean; pass loss="):
        look(model, optimizer, x, forward=lambda model, x: (model(x), x))
    low_rank = LowRankLinear(6, 5, rank=2)
    with pytest.raises(ValueError, match="LowRankOptimizer takes several gradients a step"):
        look(low_rank, LowRankOptimizer(low_rank, integrator="abc_psi"), x)


def test_shapes_that_depend_on_values_are_refused_with_a_way_out():
    model, x = nn.Linear(6, 5), torch.ones(4, 6)
    optimizer = torch.optim.SGD(model.parameters())

    def forward(model: nn.Module, x: Tensor) -> Tensor:
        return model(x[x[:, 0] > 0])

    with pytest.raises(RuntimeError, match=r"shapes depend on values .*Measure one instead: .*training_memory"):
        memory_report(model, optimizer, x, forward=forward)
    assert training_memory(model, optimizer, x, forward=forward).weights == 4 * 35
