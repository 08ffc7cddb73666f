"""Learning-rate schedulers see one optimizer: every group follows, also after a state dict."""

import copy

import pytest
import torch
from torch.optim import lr_scheduler as S

SCHEDULERS = {
    "step": lambda o: S.StepLR(o, step_size=3, gamma=0.5),
    "cosine": lambda o: S.CosineAnnealingLR(o, T_max=20),
    "lambda": lambda o: S.LambdaLR(o, [lambda e: 0.9**e, lambda e: 0.8**e]),
    "sequential": lambda o: S.SequentialLR(
        o, [S.LinearLR(o, start_factor=0.1, total_iters=3), S.ExponentialLR(o, gamma=0.9)], milestones=[3]
    ),
    "one_cycle": lambda o: S.OneCycleLR(o, max_lr=[0.1, 0.2], total_steps=20, cycle_momentum=False),
}


@pytest.mark.parametrize("name", SCHEDULERS)
def test_a_scheduler_moves_every_group_and_survives_a_round_trip(kit, name):
    model = kit.make_model()
    optimizer = kit.make_optimizer(model)
    scheduler = SCHEDULERS[name](optimizer)
    rates = []
    for step in range(12):
        kit.train(model, optimizer, range(step, step + 1))
        scheduler.step()
        rates.append([group["lr"] for group in optimizer.param_groups])
        if step == 5:
            saved = [copy.deepcopy(thing.state_dict()) for thing in (model, optimizer, scheduler)]
    assert len({tuple(r) for r in rates}) > 3 or name == "step"

    again = kit.make_model(rank=2, seed=1)
    optimizer = kit.make_optimizer(again)
    scheduler = SCHEDULERS[name](optimizer)
    for thing, state in zip((again, optimizer, scheduler), saved, strict=True):
        thing.load_state_dict(state)
    for step in range(6, 12):
        kit.train(again, optimizer, range(step, step + 1))
        scheduler.step()
        assert [group["lr"] for group in optimizer.param_groups] == rates[step]
    kit.assert_same(again.state_dict(), model.state_dict())


def test_the_base_optimizer_works_with_the_rate_that_the_scheduler_set(kit):
    model = kit.make_model()
    optimizer = kit.make_optimizer(model, base_options={"lr": 0.5})
    S.LambdaLR(optimizer, lambda epoch: 0.1)
    kit.backward(model)
    head, slope = model[4].weight.detach().clone(), model[4].weight.grad.clone()
    optimizer.step()
    torch.testing.assert_close(model[4].weight.detach(), head - 0.05 * slope, atol=1e-15, rtol=0)


def test_reduce_on_plateau_moves_every_group(kit):
    model = kit.make_model()
    optimizer = kit.make_optimizer(model)
    scheduler = S.ReduceLROnPlateau(optimizer, factor=0.1, patience=0)
    for loss in (1.0, 1.0, 1.0):
        kit.train(model, optimizer, range(1))
        scheduler.step(loss)
    assert [group["lr"] for group in optimizer.param_groups] == pytest.approx([0.0005, 0.0005])
    scheduler.load_state_dict(scheduler.state_dict())
    optimizer.load_state_dict(optimizer.state_dict())
    scheduler.step(1.0)
    assert [group["lr"] for group in optimizer.param_groups] == pytest.approx([0.00005, 0.00005])


@pytest.mark.parametrize("scheduler", ["one_cycle", "cyclic"])
@pytest.mark.parametrize(
    ("base", "read"),
    [
        (torch.optim.SGD, lambda group: group["momentum"]),
        (torch.optim.AdamW, lambda group: group["betas"][0]),
        (torch.optim.RMSprop, lambda group: group["momentum"]),
    ],
)
def test_momentum_is_cycled_in_every_group(kit, base, read, scheduler):
    model = kit.make_model()
    optimizer = kit.make_optimizer(model, base=base, base_options={"lr": 0.01})
    if scheduler == "one_cycle":
        cycle = S.OneCycleLR(optimizer, max_lr=0.1, total_steps=10)
    else:
        cycle = S.CyclicLR(optimizer, base_lr=0.01, max_lr=0.1, step_size_up=4)
    expected, found = [], []
    for step in range(8):
        expected.append(optimizer.param_groups[0]["momentum"])
        kit.train(model, optimizer, range(step, step + 1))
        found.append(read(optimizer.param_groups[1]))
        cycle.step()
    assert found == expected
    assert len(set(found)) > 3


def test_a_cycled_momentum_survives_a_round_trip(kit):
    def build(model):
        optimizer = kit.make_optimizer(model, base=torch.optim.AdamW, base_options={"lr": 0.01})
        return optimizer, S.OneCycleLR(optimizer, max_lr=0.1, total_steps=10)

    model, again = kit.make_model(), kit.make_model(seed=1)
    (optimizer, cycle), (resumed, resumed_cycle) = build(model), build(again)
    for step in range(4):
        kit.train(model, optimizer, range(step, step + 1))
        cycle.step()
    again.load_state_dict(model.state_dict())
    resumed.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    resumed_cycle.load_state_dict(cycle.state_dict())
    for m, o, c in ((model, optimizer, cycle), (again, resumed, resumed_cycle)):
        for step in range(4, 8):
            kit.train(m, o, range(step, step + 1))
            c.step()
    kit.assert_same(again.state_dict(), model.state_dict())


def test_options_of_the_factors_stay_out_of_the_other_groups(kit):
    adam = kit.make_optimizer(kit.make_model(), base=torch.optim.AdamW, base_options={"lr": 0.1})
    assert "momentum" not in adam.param_groups[1]
    assert adam.param_groups[1].keys() == torch.optim.AdamW([torch.ones(1)]).param_groups[0].keys()
    assert adam.param_groups[0].keys() == {"params", "lr", "momentum", "weight_decay"}


def test_a_direct_change_of_the_betas_is_respected(kit):
    model = kit.make_model()
    optimizer = kit.make_optimizer(model, base=torch.optim.AdamW, base_options={"lr": 0.1})
    optimizer.param_groups[1]["betas"] = (0.5, 0.9)
    kit.train(model, optimizer, range(2))
    assert optimizer.param_groups[1]["betas"] == (0.5, 0.9)
