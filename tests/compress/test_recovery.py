"""Recovery is an ordinary training loop on a compressed model, and gives back everything but the weights."""

import copy
import json
from collections.abc import Iterator
from itertools import pairwise
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.optim.lr_scheduler import LambdaLR
from torch.utils.data import DataLoader, TensorDataset

from dynarank.compress import SoftTargets, compress_, recover_, training_only
from dynarank.compress.recovery import repeated, rise_and_fall
from dynarank.errors import NonFiniteGradientError
from dynarank.factorize import deployed_parameters
from dynarank.layers.base import low_rank_layers
from dynarank.optim.low_rank_optimizer import LowRankOptimizer
from dynarank.ranks.budget import Budget
from dynarank.schedules.periodic import Periodic

Batches = list[tuple[Tensor, Tensor]]


@pytest.fixture
def data() -> Batches:
    """A task that a small network can learn: which of five directions an input has most of."""
    directions = torch.randn(20, 5, dtype=torch.float64)
    inputs = torch.randn(4, 16, 20, dtype=torch.float64)
    return [(x, (x @ directions).argmax(-1)) for x in inputs]


def dense() -> nn.Sequential:
    kind: dict[str, Any] = {"dtype": torch.float64}
    return nn.Sequential(
        nn.Linear(20, 24, **kind),
        nn.BatchNorm1d(24, **kind),
        nn.ReLU(),
        nn.Linear(24, 24, **kind),
        nn.ReLU(),
        nn.Linear(24, 5, **kind),
    )


@pytest.fixture
def model(data: Batches) -> nn.Sequential:
    model = dense()
    compress_(model, 0.6, calibration=data)
    return model


def loss(outputs: Tensor, batch: Any) -> Tensor:
    return cross_entropy(outputs, batch[1])


def weights_of(model: nn.Module) -> dict[str, list[Any]]:
    return {name: tensor.tolist() for name, tensor in model.state_dict().items()}


# --- what it is --------------------------------------------------------------------------------------------------


def test_it_is_the_loop_one_would_write(model: Any, data: Batches):
    """To the last bit."""
    by_hand, steps = copy.deepcopy(model), 60
    told: list[tuple[int, int, float]] = []
    found = recover_(model, data, loss, steps=steps, lr=0.02, tell=lambda *what: told.append(what))
    optimizer = LowRankOptimizer(
        by_hand,
        lr=0.02,
        integrator="tangent_muon",
        rank_policy="fixed",
        schedule=Periodic(every=3, freeze=30),
        base=torch.optim.AdamW,
        base_options={"lr": 1e-3},
    )
    scheduler = LambdaLR(optimizer, lambda step: rise_and_fall(step, steps))
    by_hand.train()
    losses = []
    for step in range(steps):
        optimizer.zero_grad()
        value = loss(by_hand(data[step % 4][0]), data[step % 4])
        value.backward()
        optimizer.step()
        scheduler.step()
        losses.append(float(value.detach()))
    assert weights_of(model) == weights_of(by_hand)
    assert found.first_loss == pytest.approx(sum(losses[:6]) / 6)
    assert found.last_loss == pytest.approx(sum(losses[-6:]) / 6)
    assert found.steps == steps and found.seconds > 0
    assert told == [(50, steps, pytest.approx(sum(losses[:50]) / 50))]  # every fifty steps


@pytest.mark.parametrize("only", [None, "core", ["0", "3"]])
def test_the_loss_falls_and_the_ranks_stay(model: Any, data: Batches, only: Any):
    ranks = {name: layer.rank for name, layer in low_rank_layers(model).items()}
    found = recover_(model, data, loss, steps=60, base_options={"lr": 1e-2}, only=only)
    assert found.last_loss < 0.95 * found.first_loss
    assert found.ranks_before == found.ranks_after == ranks
    assert {name: layer.rank for name, layer in low_rank_layers(model).items()} == ranks


@pytest.mark.parametrize("fraction", [0.4, 0.8])
def test_ranks_that_move_stay_within_the_budget(model: Any, data: Batches, fraction: float):
    whole = deployed_parameters(dense())
    found = recover_(model, data, loss, steps=40, lr=0.05, rank_policy=Budget(fraction))
    assert deployed_parameters(model) <= fraction * whole
    assert found.ranks_after == {name: layer.rank for name, layer in low_rank_layers(model).items()}
    moved = sum(found.ranks_before[name] != rank for name, rank in found.ranks_after.items())
    assert moved and f"the ranks of {moved} of 2 layers moved" in str(found)


def test_a_model_without_low_rank_layers_is_trained_by_the_base_optimizer(data: Batches):
    model = dense()
    by_hand = copy.deepcopy(model)
    recover_(model, data, loss, steps=5)
    optimizer = torch.optim.AdamW(by_hand.parameters(), lr=1e-3)
    scheduler = LambdaLR(optimizer, lambda step: rise_and_fall(step, 5))
    by_hand.train()
    for step in range(5):
        optimizer.zero_grad()
        loss(by_hand(data[step % 4][0]), data[step % 4]).backward()
        optimizer.step()
        scheduler.step()
    assert weights_of(model) == weights_of(by_hand)


def test_it_can_be_called_again_and_the_model_compressed_again(model: Any, data: Batches):
    first = recover_(model, data, loss, steps=20)
    second = recover_(model, data, loss, steps=20)
    assert second.first_loss < first.first_loss
    size = deployed_parameters(model)
    compress_(model, 0.7, calibration=data)
    assert deployed_parameters(model) <= 0.7 * size
    recover_(model, data, loss, steps=3)


def test_the_outcome_is_json_and_says_how_many_numbers_were_trained(model: Any, data: Batches):
    found = recover_(model, data, loss, steps=3)
    assert json.loads(json.dumps(found.as_dict(), allow_nan=False))["trained"] == found.trained
    assert found.trained == sum(p.numel() for p in model.parameters())
    assert str(found).startswith("3 steps in 0 s on ")


def test_no_gradient_is_left_behind(model: Any, data: Batches):
    for only in (None, "core"):
        recover_(model, data, loss, steps=2, only=only)
        assert all(p.grad is None for p in model.parameters())


# --- with a teacher ----------------------------------------------------------------------------------------------


def test_a_teacher_alone_is_approached_and_stays_as_it_is(data: Batches, state_of: Any):
    teacher = dense()
    model = copy.deepcopy(teacher)
    compress_(model, 0.5, calibration=data)
    teacher.train()
    teacher[1].eval()  # a part frozen by its owner
    before = state_of(teacher)
    found = recover_(model, data, steps=60, teacher=teacher, base_options={"lr": 1e-2})
    assert state_of(teacher) == before
    assert found.last_loss < 0.5 * found.first_loss


def test_loss_and_teacher_are_added(model: Any, data: Batches):
    teacher, seen = dense().eval(), []
    x, targets = data[0]

    def watched(outputs: Tensor, batch: Any) -> Tensor:
        with torch.no_grad():
            distance = SoftTargets(3.0)(outputs, teacher(batch[0]))
        seen.append(float(loss(outputs, batch).detach() + 0.25 * distance))
        return loss(outputs, batch)

    found = recover_(
        model, [(x, targets)], watched, steps=1, teacher=teacher, distance=SoftTargets(3.0), teacher_weight=0.25
    )
    assert found.first_loss == pytest.approx(seen[0], rel=1e-12)


# --- which parts train -------------------------------------------------------------------------------------------


def test_core_trains_cores_biases_and_norms_and_gives_back_the_form(model: Any, data: Batches):
    before = copy.deepcopy(model)
    with training_only(model, "core"):
        trained = {name for name, p in model.named_parameters() if p.requires_grad}
        assert trained == {"0.S", "0.bias", "1.weight", "1.bias", "3.S", "3.bias", "5.bias"}
        torch.testing.assert_close(model(data[0][0]), before(data[0][0]), atol=1e-12, rtol=1e-12)
        sizes = sum(p.numel() for p in model.parameters() if p.requires_grad)
    assert {name: p.requires_grad for name, p in model.named_parameters()} == {
        name: True for name, _ in before.named_parameters()
    }
    for name, layer in low_rank_layers(model).items():
        old: Any = before.get_submodule(name)
        assert layer.form == "pair" and layer.rank == old.rank
        torch.testing.assert_close(layer.weight.detach(), old.weight.detach(), atol=1e-13, rtol=1e-12)
    found = recover_(model, data, loss, steps=10, only="core")
    assert found.trained == sizes
    for name, layer in low_rank_layers(model).items():
        old = before.get_submodule(name)
        for new_basis, basis in ((layer.factors().U, old.factors().U), (layer.factors().V, old.factors().V)):
            torch.testing.assert_close(new_basis @ new_basis.mT, basis @ basis.mT, atol=1e-10, rtol=0)
        assert not torch.equal(layer.weight.detach(), old.weight.detach())
    assert torch.equal(model[5].weight, before[5].weight)
    assert not torch.equal(model[1].weight, before[1].weight)


@pytest.mark.parametrize("form", ["pair", "core"])
def test_layers_come_back_in_the_form_they_had(model: Any, data: Batches, form: Any):
    model[0].set_factors(model[0].factors(), form=form)
    recover_(model, data, loss, steps=3, only="core")
    assert model[0].form == form and model[3].form == "pair"


@pytest.mark.parametrize(("only", "names"), [(["0"], {"0"}), (["0", "5"], {"0", "5"}), ("3|5", {"3", "5"})])
def test_named_layers_train_alone(model: Any, data: Batches, only: Any, names: set[str]):
    before = copy.deepcopy(model)
    found = recover_(model, data, loss, steps=5, only=only, base_options={"lr": 1e-2, "weight_decay": 0.1})
    changed = {
        name.split(".")[0]
        for (name, p), (_, q) in zip(model.named_parameters(), before.named_parameters(), strict=True)
        if not torch.equal(p, q)
    }
    assert changed == names
    assert found.trained == sum(p.numel() for name in names for p in model.get_submodule(name).parameters())
    assert all(p.requires_grad for p in model.parameters())


@pytest.mark.parametrize("only", [None, "core", ["0"]])
def test_what_is_frozen_stays_frozen_and_as_it_was(model: Any, data: Batches, only: Any):
    model[0].bias.requires_grad_(False)
    model[3].requires_grad_(False)
    before = copy.deepcopy(model)
    recover_(model, data, loss, steps=5, only=only)
    flags = {name: p.requires_grad for name, p in model.named_parameters()}
    assert flags == {name: p.requires_grad for name, p in before.named_parameters()}
    assert torch.equal(model[0].bias, before[0].bias)
    assert torch.equal(model[3].bias, before[3].bias)
    torch.testing.assert_close(model[3].weight.detach(), before[3].weight.detach(), atol=1e-13, rtol=1e-12)


@pytest.mark.parametrize("training", [True, False])
def test_modes_are_given_back(model: Any, data: Batches, training: bool):
    model.train(training)
    model[4].train(not training)
    modes = [module.training for module in model.modules()]
    recover_(model, data, loss, steps=2)
    assert [module.training for module in model.modules()] == modes


# --- when it fails -----------------------------------------------------------------------------------------------


def failing(outputs: Tensor, batch: Any) -> Tensor:
    raise KeyError("mine")


def not_finite(outputs: Tensor, batch: Any) -> Tensor:
    return loss(outputs, batch) * torch.nan


def infinite_slope(outputs: Tensor, batch: Any) -> Tensor:
    return (outputs * 0).abs().sqrt().sum()


@pytest.mark.parametrize("only", [None, "core", ["0"]])
@pytest.mark.parametrize(
    ("objective", "error"),
    [(failing, KeyError), (not_finite, NonFiniteGradientError), (infinite_slope, NonFiniteGradientError)],
)
def test_a_failure_gives_back_flags_forms_modes_and_the_teacher(
    model: Any, data: Batches, state_of: Any, only: Any, objective: Any, error: Any
):
    teacher = dense().train()
    teacher[1].eval()
    model.eval()
    model[3].bias.requires_grad_(False)
    before, teachers = copy.deepcopy(model), state_of(teacher)
    with pytest.raises(error):
        recover_(model, data, objective, steps=3, only=only, teacher=teacher)
    assert state_of(teacher)[:5] == teachers[:5]
    assert [module.training for module in model.modules()] == [module.training for module in before.modules()]
    flags = {name: p.requires_grad for name, p in before.named_parameters()}
    assert {name: p.requires_grad for name, p in model.named_parameters()} == flags
    for name, layer in low_rank_layers(model).items():
        old: Any = before.get_submodule(name)
        assert layer.form == "pair"
        torch.testing.assert_close(layer.weight.detach(), old.weight.detach(), atol=1e-13, rtol=1e-12)
    assert all(bool(p.isfinite().all()) for p in model.parameters())


def test_a_gradient_that_is_not_finite_is_named_without_low_rank_layers_too(data: Batches):
    model = dense()
    with pytest.raises(NonFiniteGradientError, match=r"0.weight: gradient is not finite at step 1. The model is left"):
        recover_(model, data, not_finite, steps=3)


WRONG: list[tuple[dict[str, Any], str]] = [
    ({"loss": None}, "recover_ needs a loss, a teacher or both, got neither."),
    ({"steps": 0}, "steps must be a whole number, at least 1, got 0."),
    ({"steps": -2}, "steps must be a whole number, at least 1, got -2."),
    ({"steps": 2.5}, "steps must be a whole number, at least 1, got 2.5."),
    ({"batches": []}, "batches holds no batch, or is an iterator that has come to its end."),
    ({"batches": iter([])}, "batches holds no batch"),
    ({"lr": -1.0}, "must be at least 0, got -1.0"),
    ({"integrator": "euler"}, "unknown integrator 'euler'"),
    ({"rank_policy": "growth"}, "unknown rank policy 'growth'"),
    ({"only": ["layer9"]}, "'layer9' matches no layer"),
]


@pytest.mark.parametrize(("options", "message"), WRONG)
def test_wrong_arguments_are_refused_and_change_nothing(
    model: Any, data: Batches, state_of: Any, options: dict[str, Any], message: str
):
    before = state_of(model)
    with pytest.raises(ValueError, match=message):
        recover_(**{"model": model, "batches": data, "loss": loss, "steps": 3} | options)
    assert state_of(model) == before


def test_there_must_be_something_to_train(model: Any, data: Batches):
    with pytest.raises(ValueError, match=r"only='core' needs low-rank layers, and the model has none. Call compress_"):
        recover_(dense(), data, loss, steps=3, only="core")
    model.requires_grad_(False)
    for only in (None, "core", ["0"]):
        with pytest.raises(ValueError, match="nothing to train: every parameter is frozen"):
            recover_(model, data, loss, steps=3, only=only)
        assert [layer.form for layer in low_rank_layers(model).values()] == ["pair", "pair"]
        assert not any(p.requires_grad for p in model.parameters())


# --- batches and learning rates ----------------------------------------------------------------------------------


def test_batches_that_end_are_gone_through_again():
    assert [batch for batch, _ in zip(repeated([1, 2, 3]), range(7), strict=False)] == [1, 2, 3, 1, 2, 3, 1]


def test_an_iterator_that_ends_says_so(model: Any, data: Batches):
    modes = [module.training for module in model.modules()]
    with pytest.raises(ValueError, match="is an iterator that has come to its end"):
        recover_(model, iter(data), loss, steps=5)
    assert [module.training for module in model.modules()] == modes
    recover_(model, iter(data), loss, steps=4)


def test_a_loader_a_list_and_an_endless_generator_train_alike(model: Any, data: Batches):
    def endless() -> Iterator[tuple[Tensor, Tensor]]:
        while True:
            yield from data

    loader = DataLoader(TensorDataset(*(torch.cat(part) for part in zip(*data, strict=True))), batch_size=16)
    found = []
    for batches in (data, endless(), loader):
        one = copy.deepcopy(model)
        recover_(one, batches, loss, steps=6)
        found.append(weights_of(one))
    assert found[0] == found[1] == found[2]


def test_batches_go_through_the_forward_they_need(model: Any, data: Batches):
    other, named = copy.deepcopy(model), [{"input": x, "targets": y} for x, y in data]
    recover_(model, data, loss, steps=3)
    recover_(
        other,
        named,
        lambda outputs, batch: cross_entropy(outputs, batch["targets"]),
        steps=3,
        forward=lambda model, batch: model(batch["input"]),
    )
    assert weights_of(model) == weights_of(other)


@pytest.mark.parametrize("steps", [1, 2, 10, 19, 20, 40, 1000])
def test_learning_rates_rise_shortly_and_fall_to_nothing(steps: int):
    rates = [rise_and_fall(step, steps) for step in range(steps + 1)]
    top = max(1, steps // 20)
    assert max(rates) == rates[top - 1] == 1
    assert all(a < b for a, b in pairwise(rates[:top]))
    assert all(a >= b for a, b in pairwise(rates[top - 1 :]))
    assert rates[0] > 0 and all(rate > 0 for rate in rates[:-1])
    assert rates[-1] == pytest.approx(0, abs=1e-12) or steps == 1


def test_the_optimizer_follows_the_curve(model: Any, data: Batches):
    seen: list[float] = []

    class Watched(torch.optim.SGD):
        def step(self, closure: Any = None) -> Any:
            seen.append(self.param_groups[0]["lr"])
            return super().step(closure)

    recover_(model, data, loss, steps=8, only="core", base=Watched, base_options={"lr": 0.5})
    assert seen == pytest.approx([0.5 * rise_and_fall(step, 8) for step in range(8)])
