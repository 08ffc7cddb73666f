"""Any torch optimizer goes on with what took the place of a weight, as if it had been built with it."""

import copy
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim.lr_scheduler import StepLR

from dynarank.dense_start._host import check_host, exchange, first_state, leave, transported
from dynarank.dense_start.dense_start import DenseStart
from dynarank.ranks.base import AbstractRankPolicy, Decision, LayerSpectrum, PlanContext
from dynarank.switches.at_step import AtStep

OPTIMIZERS: dict[str, Callable[..., torch.optim.Optimizer]] = {
    "sgd": lambda p: torch.optim.SGD(p, lr=0.5),
    "momentum": lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9, nesterov=True, weight_decay=1e-3),
    "adam": lambda p: torch.optim.Adam(p, lr=0.01),
    "adam foreach": lambda p: torch.optim.Adam(p, lr=0.01, foreach=True),
    "adamw": lambda p: torch.optim.AdamW(p, lr=0.01),
    "adamw fused": lambda p: torch.optim.AdamW(p, lr=0.01, fused=True),
    "adamw amsgrad": lambda p: torch.optim.AdamW(p, lr=0.01, amsgrad=True),
    "nadam": lambda p: torch.optim.NAdam(p, lr=0.01),
    "radam": lambda p: torch.optim.RAdam(p, lr=0.05),
    "adamax": lambda p: torch.optim.Adamax(p, lr=0.01),
    "adagrad": lambda p: torch.optim.Adagrad(p, lr=0.05, initial_accumulator_value=0.1),
    "adagrad fused": lambda p: torch.optim.Adagrad(p, lr=0.05, fused=True),
    "rmsprop": lambda p: torch.optim.RMSprop(p, lr=0.005),
    "rmsprop centered": lambda p: torch.optim.RMSprop(p, lr=0.002, centered=True, momentum=0.5),
    "adadelta": lambda p: torch.optim.Adadelta(p, lr=1.0),
    "asgd": lambda p: torch.optim.ASGD(p, lr=0.5),
    "rprop": lambda p: torch.optim.Rprop(p, lr=0.005),
    "adafactor": lambda p: torch.optim.Adafactor(p, lr=0.02),
    "muon": lambda p: torch.optim.Muon([w for w in p if w.dim() == 2], lr=0.02),
}
ADAPTIVE = ("adam", "adamw amsgrad", "momentum", "rmsprop", "adagrad", "adadelta", "nadam", "muon")


class Ranks(AbstractRankPolicy):
    """Rank 5 at the switch after step 3, rank 3 from the refresh after step 6 on."""

    def plan(self, spectra: Sequence[LayerSpectrum], context: PlanContext) -> list[Decision]:
        return [Decision(min(5 if context.step < 6 else 3, len(s.sigma)), 0, "scripted") for s in spectra]


def make_model() -> Any:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(12, 20), nn.Tanh(), nn.Linear(20, 14), nn.Tanh(), nn.Linear(14, 4)).double()


def start(model: nn.Module, optimizer: torch.optim.Optimizer, **options: Any) -> DenseStart:
    return DenseStart(model, optimizer, switch=AtStep(3), rank_policy=Ranks(), every=3, **options)


def loss_of(model: nn.Module) -> Tensor:
    x = torch.randn(64, 12, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    return nn.functional.cross_entropy(model(x), x[:, :4].argmax(dim=1))


def train(model: nn.Module, optimizer: torch.optim.Optimizer, steps: int) -> list[float]:
    losses = []
    for _ in range(steps):
        optimizer.zero_grad()
        loss = loss_of(model)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


# --- every optimizer ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("trained", ["core", "factors"])
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_the_loss_keeps_falling_through_switch_and_refresh(name, trained):
    model = make_model()
    optimizer = OPTIMIZERS[name](model.parameters())
    starting = start(model, optimizer, trained=trained)
    losses = train(model, optimizer, 30)
    assert [layer.rank for layer in starting.low_rank.values()] == ([3, 3] if trained == "core" else [5, 5])
    assert losses[2] < losses[0] and losses[-1] < losses[16] < losses[7] and losses[-1] < losses[0]
    held = [p for group in optimizer.param_groups for p in group["params"]]
    wanted = [p for p in model.parameters() if p.dim() == 2 or name != "muon"]
    assert len(held) == len(wanted) and all(p is q for p, q in zip(held, wanted, strict=True))
    assert {id(p) for p in optimizer.state} <= {id(p) for p in held}


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_a_fresh_state_is_that_of_an_optimizer_built_anew(name):
    model = make_model()
    optimizer = OPTIMIZERS[name](model.parameters())
    starting = start(model, optimizer)
    for steps in (3, 1):  # up to the switch, up to the refresh
        train(model, optimizer, steps)
        core: Any = starting.low_rank["0"].S
        twin = nn.Parameter(core.detach().clone())
        anew = OPTIMIZERS[name]([twin])
        for _ in range(2):
            train(model, optimizer, 1)
            twin.grad = core.grad.clone()
            anew.step()
            torch.testing.assert_close(core, twin, atol=1e-14, rtol=1e-13)
        torch.testing.assert_close(dict(optimizer.state[core]), dict(anew.state[twin]), atol=1e-14, rtol=1e-13)


def test_an_optimizer_of_all_parameters_together_is_refused():
    model = make_model()
    with pytest.raises(ValueError, match=r"LBFGS keeps one state for all parameters together.* torch\.optim\.AdamW"):
        start(model, torch.optim.LBFGS(model.parameters()))
    with pytest.raises(TypeError, match=r"must be a torch\.optim\.Optimizer, got Sequential\."):
        check_host(model)


def test_groups_keep_their_options_and_parameters_their_order_and_names():
    model = make_model()
    names = dict(model.named_parameters())
    first = [(n, p) for n, p in names.items() if n.startswith("0")]
    rest = [(n, p) for n, p in names.items() if not n.startswith("0")]
    optimizer = torch.optim.AdamW(
        [{"params": first, "lr": 0.02, "weight_decay": 0.3}, {"params": rest[::-1], "lr": 0.005}]
    )
    scheduler = StepLR(optimizer, 4, gamma=0.5)
    start(model, optimizer)
    for _ in range(7):
        train(model, optimizer, 1)
        scheduler.step()
    assert [(g["lr"], g["weight_decay"]) for g in optimizer.param_groups] == [(0.01, 0.3), (0.0025, 0.01)]
    now = dict(model.named_parameters())
    assert [g["param_names"] for g in optimizer.param_groups] == [["0.S", "0.bias"], [*now][:1:-1]]
    for group in optimizer.param_groups:
        assert all(now[name] is p for name, p in zip(group["param_names"], group["params"], strict=True))
    before = {name: (p.detach().clone(), copy.deepcopy(optimizer.state[p])) for name, p in now.items()}
    train(model, optimizer, 1)
    for name, p in now.items():  # Adam written out, with the options of the group
        old, state = before[name]
        lr, decay = (0.01, 0.3) if name.startswith("0") else (0.0025, 0.01)
        step, grad = int(state["step"]) + 1, p.grad
        m = 0.9 * state["exp_avg"] + 0.1 * grad
        v = 0.999 * state["exp_avg_sq"] + 0.001 * grad.square()
        step_size = lr * (m / (1 - 0.9**step)) / ((v / (1 - 0.999**step)).sqrt() + 1e-8)
        torch.testing.assert_close(p.detach(), (1 - lr * decay) * old - step_size, atol=1e-13, rtol=0)
        assert step == (2 if name.endswith("S") else 8)


def test_biases_keep_their_state():
    model = make_model()
    optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
    bias: Any = model[0].bias
    start(model, optimizer)
    train(model, optimizer, 7)
    assert bias is model[0].bias and int(optimizer.state[bias]["step"]) == 7


# --- parameters that change places -------------------------------------------------------------------------------


def test_exchange_and_leave():
    a, b, c, new, other = (nn.Parameter(torch.full((2,), float(i))) for i in range(5))
    optimizer = torch.optim.Adagrad([{"params": [("a", a), ("b", b)]}, {"params": [("c", c)], "lr": 0.3}])
    exchange(optimizer, b, {"x": new, "y": other}, [{"sum": torch.ones(2)}, {}])
    assert [list(map(id, g["params"])) for g in optimizer.param_groups] == [[id(a), id(new), id(other)], [id(c)]]
    assert optimizer.param_groups[0]["param_names"] == ["a", "x", "y"]
    assert b not in optimizer.state and optimizer.state[new] == {"sum": pytest.approx(torch.ones(2))}
    assert optimizer.state[other].keys() == {"step", "sum"}
    exchange(optimizer, a, {"a": a}, [{}])
    assert optimizer.param_groups[0]["params"][0] is a and int(optimizer.state[a]["step"]) == 0
    leave(optimizer, new)
    assert optimizer.param_groups[0]["param_names"] == ["a", "y"] and new not in optimizer.state


def test_the_first_state_has_the_options_of_the_group():
    parameter = nn.Parameter(torch.ones(2, 3))
    adagrad = torch.optim.Adagrad([{"params": [parameter], "initial_accumulator_value": 0.7}])
    state = first_state(adagrad, adagrad.param_groups[0], nn.Parameter(torch.ones(4)))
    assert torch.equal(state["sum"], torch.full((4,), 0.7)) and int(state["step"]) == 0
    adam = torch.optim.Adam([parameter])
    assert first_state(adam, adam.param_groups[0], nn.Parameter(torch.ones(4))) == {}


def test_an_optimizer_with_a_constructor_of_its_own_starts_empty():
    class Odd(torch.optim.SGD):
        def __init__(self, params: Any, *, must: int) -> None:
            super().__init__(params, lr=0.1)

    parameter = nn.Parameter(torch.ones(2))
    odd = Odd([parameter], must=1)
    assert first_state(odd, odd.param_groups[0], parameter) == {}


# --- transported state -------------------------------------------------------------------------------------------


def bases(m: int, n: int, rank: int) -> tuple[Tensor, Tensor]:
    U, V = (torch.linalg.qr(torch.randn(size, rank, dtype=torch.float64))[0] for size in (m, n))
    return U, V


@pytest.mark.parametrize(("m", "n", "rank"), [(7, 5, 3), (5, 7, 1), (4, 4, 4)])
def test_averages_are_projected_and_squares_stay_positive(m, n, rank):
    old = torch.zeros(m, n).double()
    U, V = bases(m, n, rank)
    M, v, step = torch.randn(m, n).double(), torch.rand(m, n).double(), torch.tensor(7.0)
    state = {"step": step, "exp_avg": M, "exp_avg_sq": v, "max_exp_avg_sq": 2 * v, "maximize": None}
    found = transported(state, old, U=U, V=V, as_matrix=lambda t: t)
    squares = torch.einsum("mr,mn,ns->rs", U**2, v, V**2)
    torch.testing.assert_close(found["exp_avg"], torch.einsum("mr,mn,ns->rs", U, M, V), atol=1e-14, rtol=0)
    torch.testing.assert_close(found["exp_avg_sq"], squares, atol=1e-14, rtol=0)
    torch.testing.assert_close(found["max_exp_avg_sq"], 2 * squares, atol=1e-14, rtol=0)
    assert float(found["exp_avg_sq"].min()) > 0 and found["step"] is step and found["maximize"] is None
    assert found["exp_avg"].shape == (rank, rank) and found["exp_avg"].is_contiguous()


@pytest.mark.parametrize("name", ["grad_avg", "row_var", "prev"])
def test_what_a_state_becomes_is_not_guessed(name):
    state = {"step": torch.tensor(1.0), name: torch.ones(3, 1 if name == "row_var" else 2)}
    with pytest.raises(ValueError, match=f"what '{name}' in the optimizer's state becomes .* Choose state='fresh'"):
        transported(state, torch.zeros(3, 2), U=torch.eye(3), V=torch.eye(2), as_matrix=lambda t: t)


def test_a_factored_average_of_a_known_name_is_refused_too():
    with pytest.raises(ValueError, match="what 'exp_avg_sq' in the optimizer's state"):
        transported(
            {"exp_avg_sq": torch.ones(3)}, torch.zeros(3, 2), U=torch.eye(3), V=torch.eye(2), as_matrix=torch.clone
        )


@pytest.mark.parametrize("form", ["matrix", "spatial"])
def test_states_are_transported_at_the_switch_and_at_a_refresh(form):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(4, 8, (3, 2)), nn.Flatten(), nn.Linear(8 * 2 * 3, 2)).double()
    x = torch.randn(16, 4, 4, 4).double()
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    seen: list[Any] = []

    def remember(*_: Any) -> None:
        layer: Any = model[0]
        core = getattr(layer, "S", None)
        trained = layer.weight if core is None else core
        seen.append((copy.deepcopy(optimizer.state[trained]), layer))
        if core is not None:
            seen[-1] += (layer.U.clone(), layer.V.clone())

    optimizer.register_step_post_hook(remember)  # before the layers change
    starting = start(model, optimizer, state="transported", conv_form=form)
    for step in range(1, 7):
        optimizer.zero_grad()
        (model(x).sum(dim=1) - x[:, 0, 0, 0]).square().mean().backward()
        optimizer.step()
        layer: Any = starting.low_rank.get("0")
        if step not in (3, 6):
            continue
        state, now = seen[-1][0], optimizer.state[layer.S]
        P, Q = layer.U, layer.V
        M, v = state["exp_avg"], state["exp_avg_sq"]
        if step == 3:
            turn = (lambda t: t.permute(0, 3, 1, 2).reshape(16, 12)) if form == "spatial" else lambda t: t.flatten(1)
            M, v = turn(M), turn(v)
        else:
            P, Q = seen[-1][2].T @ P, seen[-1][3].T @ Q
        assert layer.rank == (5 if step == 3 else 3) and int(now["step"]) == step
        torch.testing.assert_close(now["exp_avg"], P.T @ M @ Q, atol=1e-14, rtol=1e-12)
        torch.testing.assert_close(now["exp_avg_sq"], (P**2).T @ v @ Q**2, atol=1e-16, rtol=1e-12)


@pytest.mark.parametrize("name", ADAPTIVE)
def test_the_loss_keeps_falling_with_a_transported_state(name):
    model = make_model()
    optimizer = OPTIMIZERS[name](model.parameters())
    start(model, optimizer, state="transported")
    losses = train(model, optimizer, 30)
    assert losses[2] < losses[0] and losses[-1] < losses[16] < losses[7] and losses[-1] < losses[0]


@pytest.mark.parametrize("name", ["adamax", "rprop", "rmsprop centered", "adafactor", "asgd"])
def test_an_unknown_state_is_refused_before_anything_changes(name):
    model, plain = make_model(), make_model()
    optimizer, alone = (OPTIMIZERS[name](m.parameters()) for m in (model, plain))
    starting = start(model, optimizer, state="transported")
    train(model, optimizer, 2)
    with pytest.raises(ValueError, match="Choose state='fresh'"):
        train(model, optimizer, 1)
    train(plain, alone, 3)
    torch.testing.assert_close(dict(model.state_dict()), dict(plain.state_dict()), atol=0, rtol=0)
    torch.testing.assert_close(optimizer.state_dict(), alone.state_dict(), atol=0, rtol=0)
    assert starting.low_rank == {} and starting.held == {}
