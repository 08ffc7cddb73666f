"""ReLoRA against the same training written out with plain tensors, and in any optimizer."""

import io
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim import Optimizer

from dynarank.dense_start.relora import ReLoRA

OPTIMIZERS: dict[str, Callable[..., Optimizer]] = {
    "sgd": lambda p: torch.optim.SGD(p, lr=0.5),
    "momentum": lambda p: torch.optim.SGD(p, lr=0.02, momentum=0.9),
    "adam": lambda p: torch.optim.Adam(p, lr=0.02),
    "adamw": lambda p: torch.optim.AdamW(p, lr=0.02, amsgrad=True),
    "adamw fused": lambda p: torch.optim.AdamW(p, lr=0.02, fused=True),
    "nadam": lambda p: torch.optim.NAdam(p, lr=0.02),
    "radam": lambda p: torch.optim.RAdam(p, lr=0.1),
    "adamax": lambda p: torch.optim.Adamax(p, lr=0.02),
    "adagrad": lambda p: torch.optim.Adagrad(p, lr=0.05),
    "adadelta": lambda p: torch.optim.Adadelta(p, lr=1.0),
    "rmsprop": lambda p: torch.optim.RMSprop(p, lr=0.005),
    "rprop": lambda p: torch.optim.Rprop(p, lr=0.005),
    "asgd": lambda p: torch.optim.ASGD(p, lr=0.5),
    "adafactor": lambda p: torch.optim.Adafactor(p, lr=0.05),
}


def model_of(seed: int = 0) -> nn.Sequential:
    torch.manual_seed(seed)
    layers = nn.Sequential(nn.Linear(7, 11), nn.Tanh(), nn.Linear(11, 9), nn.Tanh(), nn.Linear(9, 3))
    return layers.double()


def data(seed: int = 1) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(32, 7, generator=generator, dtype=torch.float64)
    return x, (x @ torch.randn(7, 3, generator=generator, dtype=torch.float64)).tanh()


def train(model: nn.Module, optimizer: Optimizer, steps: int) -> list[float]:
    x, y = data()
    losses = []
    for _ in range(steps):
        optimizer.zero_grad()
        loss = F.mse_loss(model(x), y)
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    return losses


def state_of(relora: ReLoRA) -> dict[str, Any]:
    file = io.BytesIO()
    parts = {"model": relora.model, "optimizer": relora.optimizer, "relora": relora}
    torch.save({name: part.state_dict() for name, part in parts.items()}, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


# --- the method --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [(7, 5), (5, 7), (9, 9)])
@pytest.mark.parametrize("rank", [1, 2])
@pytest.mark.parametrize("momentum", [0.0, 0.9])
@pytest.mark.parametrize("warmup", [0, 3])
def test_it_is_training_with_plain_tensors(shape: tuple[int, int], rank: int, momentum: float, warmup: int):
    (m, n), every, lr = shape, 4, 0.05
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(n, m)).double()
    x, y = torch.randn(20, n, dtype=torch.float64), torch.randn(20, m, dtype=torch.float64)
    W, b = model[0].weight.detach().clone(), model[0].bias.detach().clone()
    optimizer = torch.optim.SGD(model.parameters(), lr=lr, momentum=momentum, weight_decay=0.01)
    relora = ReLoRA(model, optimizer, rank=rank, every=every, warmup=warmup, include_head=True)
    velocity_b = torch.zeros_like(b)
    for step in range(11):
        layer: Any = model[0]
        if step % every == 0:
            B, A = layer.update.B.detach().clone(), torch.zeros(rank, m, dtype=torch.float64)
            velocities = [torch.zeros_like(A), torch.zeros_like(B)]
            assert float(B.abs().max()) < n**-0.5
        optimizer.zero_grad()
        (model(x) - y).square().mean().backward()
        optimizer.step()

        factor = (step % every + 1) / warmup if step % every < warmup else 1.0
        G = 2 * (x @ (W + A.T @ B).T + b - y) / y.numel()  # the gradient of the outputs
        gradients = [B @ x.T @ G + 0.01 * A, A @ G.T @ x + 0.01 * B]
        velocities = [momentum * v + g for v, g in zip(velocities, gradients, strict=True)]
        velocity_b = momentum * velocity_b + G.sum(0) + 0.01 * b
        A, B = (part - lr * factor * v for part, v in zip((A, B), velocities, strict=True))
        b = b - lr * factor * velocity_b
        if step % every == every - 1:
            W = W + A.T @ B
            torch.testing.assert_close(layer.dense.weight, W, atol=1e-12, rtol=0)
            torch.testing.assert_close(layer.weight, W, atol=1e-12, rtol=0)
        else:
            torch.testing.assert_close(layer.weight, W + A.T @ B, atol=1e-12, rtol=0)
        torch.testing.assert_close(layer.bias, b, atol=1e-12, rtol=0)
    assert relora.cycle == 2


def test_the_first_cycle_trains():
    model = model_of()
    before = [model[i].weight.detach().clone() for i in (0, 2)]
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    ReLoRA(model, optimizer, rank=2, every=100)
    losses = train(model, optimizer, 20)
    assert losses[-1] < 0.9 * losses[0]
    for i, W in zip((0, 2), before, strict=True):
        layer: Any = model[i]
        assert torch.equal(layer.dense.weight, W)
        change = (layer.weight - W).detach()
        assert float(change.norm()) > 1e-3 and torch.linalg.matrix_rank(change) == 2


def test_updates_of_many_cycles_are_of_higher_rank_than_each():
    model = model_of()
    W = model[2].weight.detach().clone()
    optimizer = torch.optim.Adam(model.parameters(), lr=0.02)
    ReLoRA(model, optimizer, rank=2, every=5)
    for cycles, rank in ((1, 2), (2, 4), (3, 6)):
        train(model, optimizer, 5)
        layer: Any = model[2]
        assert torch.linalg.matrix_rank(layer.dense.weight - W, rtol=1e-9) == rank, cycles


def test_cycles_reach_what_no_single_update_could():
    torch.manual_seed(0)
    model, target = nn.Sequential(nn.Linear(10, 8, bias=False)).double(), torch.randn(8, 10, dtype=torch.float64)
    sigma = torch.linalg.svdvals(target - model[0].weight.detach())
    best = float(sigma[2:].square().sum())  # what the best update of rank 2 leaves
    optimizer = torch.optim.Adam(model.parameters(), lr=0.05)
    relora = ReLoRA(model, optimizer, rank=2, every=60, include_head=True)
    for _ in range(360):
        optimizer.zero_grad()
        loss = (model(torch.eye(10, dtype=torch.float64)).T - target).square().sum()
        loss.backward()
        optimizer.step()
        if relora.cycle == 0:
            assert float(loss.detach()) > best * (1 - 1e-12)
    assert float(loss.detach()) < 0.1 * best


def test_nothing_jumps_where_an_update_begins_and_merges():
    model, (x, _) = model_of(), data()
    start = model(x).detach()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    relora = ReLoRA(model, optimizer, rank=2, every=3)
    assert torch.equal(model(x).detach(), start)
    train(model, optimizer, 2)
    weights = [model[i].weight.detach().clone() for i in (0, 2)]
    optimizer.zero_grad(set_to_none=False)  # a step without gradients only ends the cycle
    optimizer.step()
    assert relora.cycle == 1
    for i, W in zip((0, 2), weights, strict=True):
        torch.testing.assert_close(model[i].dense.weight.detach(), W, atol=1e-14, rtol=0)  # type: ignore[union-attr]
        assert not model[i].update.A.any()  # type: ignore[union-attr]


# --- the optimizer -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_every_optimizer_trains_and_starts_each_cycle_with_fresh_state(name: str):
    model = model_of()
    optimizer = OPTIMIZERS[name](model.parameters())
    count = len(optimizer.param_groups[0]["params"])
    relora = ReLoRA(model, optimizer, rank=2, every=7)
    held = {id(p) for p in optimizer.param_groups[0]["params"]}
    assert held == {id(p) for p in model.parameters() if p.requires_grad} and len(held) == count + 2
    losses = train(model, optimizer, 6)
    moved = {key: dict(optimizer.state[p]) for key, p in model.named_parameters() if p in optimizer.state}
    losses += train(model, optimizer, 1)
    fresh = OPTIMIZERS[name]([nn.Parameter(torch.zeros(2, 3))])
    kept = {*fresh.state[fresh.param_groups[0]["params"][0]]}
    for key, p in model.named_parameters():
        if "update" in key:
            assert {*optimizer.state.get(p, {})} == kept, "as that of a parameter that has made no step"
        elif key in moved:
            assert {*optimizer.state[p]} == {*moved[key]}, "others keep theirs"
    losses += train(model, optimizer, 40)
    assert relora.cycle == 6 and losses[-1] < 0.8 * losses[0]


def test_groups_keep_their_options_and_names():
    model = model_of()
    slow, fast = ([*model[0].named_parameters("0")], [*model[2].named_parameters("2")])
    groups = [{"params": slow, "lr": 0.001}, {"params": fast, "lr": 0.1}]
    optimizer = torch.optim.SGD(groups, lr=0.01)  # type: ignore[arg-type]
    ReLoRA(model, optimizer, rank=2, every=3)
    assert [group["param_names"] for group in optimizer.param_groups] == [
        ["0.update.A", "0.update.B", "0.bias"],
        ["2.update.A", "2.update.B", "2.bias"],
    ]
    train(model, optimizer, 4)
    assert [group["lr"] for group in optimizer.param_groups] == [0.001, 0.1]


def test_the_learning_rate_rises_anew_in_every_cycle_and_schedulers_see_none_of_it():
    model = model_of()
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    scheduler = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.5)
    ReLoRA(model, optimizer, rank=2, every=5, warmup=4)
    used: list[float] = []
    optimizer.register_step_pre_hook(lambda optimizer, *_: used.append(optimizer.param_groups[0]["lr"]))
    for step in range(10):
        assert scheduler.get_last_lr() == [0.5**step] == [optimizer.param_groups[0]["lr"]]
        model(data()[0]).square().mean().backward()
        optimizer.step()
        scheduler.step()
    assert used == [0.5**step * min(1, (step % 5 + 1) / 4) for step in range(10)]


def test_a_step_that_fails_leaves_the_learning_rate():
    model = model_of()
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    ReLoRA(model, optimizer, rank=2, every=5, warmup=4)

    def fails() -> Tensor:
        raise ArithmeticError

    for _ in range(3):
        with pytest.raises(ArithmeticError):
            optimizer.step(fails)  # type: ignore[arg-type]
    train(model, optimizer, 1)
    assert optimizer.param_groups[0]["lr"] == 1.0


@pytest.mark.parametrize("name", ["momentum", "adamw", "adagrad", "adafactor"])
@pytest.mark.parametrize("stop", [1, 7, 9])
def test_an_interrupted_run_goes_on_bit_for_bit(name: str, stop: int):
    def built() -> ReLoRA:
        model = model_of()
        return ReLoRA(model, OPTIMIZERS[name](model.parameters()), rank=2, every=4, warmup=3)

    whole, first, second = built(), built(), built()
    train(whole.model, whole.optimizer, 15)
    train(first.model, first.optimizer, stop)
    saved = state_of(first)
    train(second.model, second.optimizer, 3)  # what is loaded replaces everything
    for part in ("model", "optimizer"):
        getattr(second, part).load_state_dict(saved[part])
    second.load_state_dict(saved["relora"])
    train(second.model, second.optimizer, 15 - stop)
    states = whole.model.state_dict(), second.model.state_dict()
    assert all(torch.equal(one, other) for one, other in zip(*(s.values() for s in states), strict=True))


def test_the_global_generator_is_left_alone():
    model = model_of()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    before = torch.get_rng_state()
    ReLoRA(model, optimizer, rank=2, every=2)
    train(model, optimizer, 5)
    assert torch.equal(before, torch.get_rng_state())


def test_draws_differ_between_layers_and_cycles():
    model = nn.Sequential(*[nn.Linear(6, 6) for _ in range(3)])
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    ReLoRA(model, optimizer, rank=2, every=1, include_head=True)
    drawn = []
    for _ in range(3):
        drawn += [layer.update.B.detach().clone() for layer in model]  # type: ignore[union-attr, operator]
        model(torch.ones(2, 6)).sum().backward()
        optimizer.step()
    assert all(not torch.equal(one, other) for i, one in enumerate(drawn) for other in drawn[:i])
