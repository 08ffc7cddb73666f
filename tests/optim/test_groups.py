"""Which parameters the optimizer drives, how others join, and what is refused."""

import functools

import pytest
import torch
from torch import nn

from dynarank.layers.linear import LowRankLinear
from dynarank.optim._transaction import plan_context
from dynarank.optim.low_rank_optimizer import LowRankOptimizer
from dynarank.schedules.periodic import Periodic


def test_the_first_group_holds_the_factors_and_the_others_all_the_rest(kit):
    model = kit.make_model()
    optimizer = kit.make_optimizer(model)
    assert [id(p) for p in optimizer.param_groups[0]["params"]] == [
        id(p) for p in (model[0].A, model[0].B, model[2].A, model[2].B)
    ]
    assert sum(len(group["params"]) for group in optimizer.param_groups) == len(list(model.parameters()))
    assert optimizer.base.param_groups[0] is optimizer.param_groups[1] and optimizer.base.state is optimizer.state


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"base": torch.optim.SGD([torch.ones(1)])}, TypeError, r"got an instance of SGD. Pass base=SGD"),
        ({"base": "adamw"}, TypeError, "base must be the class of an optimizer"),
        ({"base": functools.partial(torch.optim.SGD, lr=1)}, TypeError, "base must be the class of an optimizer"),
        ({"base": torch.optim.LBFGS}, ValueError, "LBFGS evaluates the loss several times"),
        ({"nonfinite": "ignore"}, ValueError, "nonfinite must be"),
        ({"lr": -1.0}, ValueError, "lr and weight_decay must be at least 0"),
        ({"momentum": 1.0}, ValueError, "momentum must be"),
        ({"integrator": "bug"}, ValueError, "unknown integrator 'bug'"),
        ({"rank_policy": 3}, TypeError, "rank policy must be a name or an instance"),
        ({"schedule": 25}, TypeError, "schedule must be a name or an instance"),
    ],
)
def test_a_wrong_option_is_refused_with_its_remedy(kit, options, error, message):
    with pytest.raises(error, match=message):
        LowRankOptimizer(kit.make_model(), **options)


def test_a_model_without_low_rank_layers_is_refused():
    with pytest.raises(ValueError, match="Call factorize_"):
        LowRankOptimizer(nn.Linear(3, 2))


# --- add_param_group ---------------------------------------------------------------------------------------------


def grown(kit, **options):
    """A model with one more low-rank layer and one more head than its optimizer knows."""
    model = kit.make_model()
    optimizer = kit.make_optimizer(model, **options)
    model.append(LowRankLinear(4, 4, rank=2).double())
    model.append(nn.Linear(4, 4).double())
    return model, optimizer


def test_added_factors_join_the_first_group_and_the_rest_becomes_a_group_of_the_base(kit):
    model, optimizer = grown(kit)
    optimizer.add_param_group({"params": model[5].parameters(), "lr": 0.3})
    optimizer.add_param_group({"params": model[6].weight})
    optimizer.add_param_group({"params": list(model[6].named_parameters())[1:], "momentum": 0.5})
    assert [len(group["params"]) for group in optimizer.param_groups] == [6, 6, 1, 1, 1]
    assert [group["lr"] for group in optimizer.param_groups] == [0.05, 0.05, 0.3, 0.05, 0.05]
    assert set(optimizer.layers) == {"0", "2", "5"}
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    kit.train(model, optimizer, range(2))
    assert all(not torch.equal(p, before[name]) for name, p in model.named_parameters())
    again, other = grown(kit)
    for index in (5, 6):
        other.add_param_group({"params": again[index].parameters()})
    with pytest.raises(ValueError, match="Add the same parameter groups first"):
        other.load_state_dict(optimizer.state_dict())


def test_a_group_can_be_the_first_of_the_base(kit):
    model = nn.Sequential(LowRankLinear(12, 8, rank=2, bias=False)).double()
    optimizer = kit.make_optimizer(model, base=torch.optim.AdamW, base_options={"lr": 0.1})
    model.append(nn.Linear(8, 4).double())
    optimizer.add_param_group({"params": model[1].parameters(), "lr": 0.01})
    assert optimizer.base.param_groups[0] is optimizer.param_groups[1]
    assert optimizer.param_groups[1].keys() == torch.optim.AdamW([torch.ones(1)]).param_groups[0].keys()
    losses = kit.train(model, optimizer, range(30))
    assert losses[-1] < losses[0]


@pytest.mark.parametrize(
    ("pick", "options", "message"),
    [
        (lambda m: [m[0].A, m[0].B], {}, "the factors of 0 are in the optimizer already"),
        (lambda m: [m[0].bias], {}, "more than one parameter group"),
        (lambda m: [m[5].A], {}, "give all factors of 5"),
        (lambda m: [m[5].A, m[5].B], {"lr": 0.1}, "share its options, got lr for 5"),
    ],
)
def test_what_cannot_be_added_is_refused_and_nothing_changes(kit, pick, options, message):
    model, optimizer = grown(kit)
    before = kit.snapshot(model, optimizer)
    with pytest.raises(ValueError, match=message):
        optimizer.add_param_group({"params": pick(model), **options})
    kit.assert_same(kit.snapshot(model, optimizer), before)
    assert len(optimizer.base.param_groups) == 1


def test_a_set_of_parameters_is_refused(kit):
    model, optimizer = grown(kit)
    with pytest.raises(TypeError, match="order changes"):
        optimizer.add_param_group({"params": set(model[6].parameters())})


# --- what the optimizer does not own ------------------------------------------------------------------------------


def test_a_low_rank_layer_that_came_later_is_named_at_the_first_step(kit):
    model, optimizer = grown(kit)
    kit.backward(model)
    before = kit.snapshot(model, optimizer)
    with pytest.raises(RuntimeError, match=r"low-rank layers 5 came into the model.*add_param_group"):
        optimizer.step()
    kit.assert_same(kit.snapshot(model, optimizer), before)
    optimizer.add_param_group({"params": model[5].parameters()})
    optimizer.step()


def test_it_is_named_at_the_next_rank_event_too(kit):
    model = kit.make_model()
    optimizer = kit.make_optimizer(model, schedule=Periodic(every=3))
    kit.train(model, optimizer, range(1))
    model.append(LowRankLinear(4, 4, rank=2).double())
    kit.train(model, optimizer, range(1, 2))
    with pytest.raises(RuntimeError, match="low-rank layers 5 came into the model"):
        kit.train(model, optimizer, range(2, 3))


def test_dense_parameters_that_came_later_are_named_once(kit, caplog):
    model = kit.make_model()
    optimizer = kit.make_optimizer(model, schedule=Periodic(every=1))
    model.append(nn.Linear(4, 4).double())
    model.append(nn.Linear(4, 4).double().requires_grad_(False))
    kit.train(model, optimizer, range(3))
    assert caplog.text.count("5.weight, 5.bias came into the model") == 1 and "6.weight" not in caplog.text


def test_a_layer_that_left_the_model_is_named(kit):
    model = kit.make_model()
    optimizer = kit.make_optimizer(model)
    model[0] = nn.Linear(12, 20).double()
    kit.backward(model)
    with pytest.raises(RuntimeError, match="drives the low-rank layers 0, which are no longer in the model"):
        optimizer.step()


def test_the_user_may_change_the_form_of_a_layer(kit):
    """New parameters take the place of the old ones, whose state is dropped."""
    model = kit.make_model()
    optimizer = kit.make_optimizer(model, integrator="augmented_bug")
    kit.train(model, optimizer, range(1))
    assert model[0].form == "core"
    model[0].set_factors(model[0].factors(), form="pair")
    kit.train(model, optimizer, range(1, 2))
    ids = {id(p) for group in optimizer.param_groups for p in group["params"]}
    assert ids == {id(p) for p in model.parameters()} and {id(p) for p in optimizer.state} <= ids
    optimizer.state_dict()


# --- frozen parameters --------------------------------------------------------------------------------------------


def test_a_frozen_layer_is_neither_moved_nor_decayed_nor_cut(kit):
    model = kit.make_model(rank=5)
    options = {"rank_policy": "relative_tail", "schedule": Periodic(every=2), "weight_decay": 0.1}
    optimizer = kit.make_optimizer(model, **options)
    kit.backward(model)  # leaves gradients behind
    model[0].requires_grad_(False)
    before = {name: getattr(model[0], name).detach().clone() for name in "AB"}
    events = []
    optimizer.on_rank_event(events.extend)
    optimizer.step()
    for _ in range(4):
        optimizer.zero_grad(set_to_none=False)
        optimizer.step()
    kit.assert_same({name: getattr(model[0], name) for name in "AB"}, before)
    assert {event.layer for event in events} == {"2"} and set(optimizer.plan_ranks()) == {"2"}
    model[0].requires_grad_(True)
    kit.train(model, optimizer, range(1))
    assert not torch.equal(model[0].A[:1], before["A"][:1])


def test_a_run_in_which_all_layers_are_frozen_holds_no_event(kit):
    model = kit.make_model()
    optimizer = kit.make_optimizer(model, rank_policy="relative_tail", schedule=Periodic(every=1))
    model[0].requires_grad_(False)
    model[2].requires_grad_(False)
    optimizer.on_rank_event(lambda events: pytest.fail("an event without layers"))
    kit.train(model, optimizer, range(2))
    assert optimizer.freeze_ranks() == []


@pytest.mark.parametrize("factor", ["A", "B"])
def test_half_a_frozen_layer_is_an_error(kit, factor):
    model = kit.make_model()
    optimizer = kit.make_optimizer(model)
    getattr(model[0], factor).requires_grad_(False)
    kit.backward(model)
    before = kit.snapshot(model, optimizer)
    with pytest.raises(RuntimeError, match="0: one of A and B is frozen"):
        optimizer.step()
    kit.assert_same(kit.snapshot(model, optimizer), before)


def test_half_a_gradient_is_an_error(kit):
    model = kit.make_model()
    optimizer = kit.make_optimizer(model)
    kit.backward(model)
    model[2].B.grad = None
    with pytest.raises(RuntimeError, match="2: one of A and B has a gradient"):
        optimizer.step()


def test_frozen_layers_count_in_the_budget_as_they_are(kit):
    model = kit.make_model(rank=3)
    optimizer = kit.make_optimizer(model)
    free = plan_context(optimizer)
    model[0].requires_grad_(False)
    held = plan_context(optimizer)
    assert (
        held.dense_parameters
        == free.dense_parameters
        == sum(
            p.numel()
            for p in nn.Sequential(nn.Linear(12, 20), nn.Linear(20, 9), nn.LayerNorm(9), nn.Linear(9, 4)).parameters()
        )
    )
    assert held.other_parameters == free.other_parameters + 3 * (12 + 20)
