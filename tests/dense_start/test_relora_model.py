"""What ReLoRA does to a model: which layers change, that each computes with the sum, and the way back."""

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim import Optimizer

from dynarank.dense_start.relora import ReLoRA
from dynarank.factorize import factorize_
from dynarank.optim.low_rank_optimizer import LowRankOptimizer


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


def sgd(model: nn.Module) -> Optimizer:
    return torch.optim.SGD(model.parameters(), lr=0.02, momentum=0.9)


def adam(model: nn.Module) -> Optimizer:
    return torch.optim.Adam(model.parameters(), lr=0.01)


@pytest.mark.parametrize("make", [sgd, adam])
def test_merging_gives_the_plain_model_back_which_trains_on(make: Callable[[nn.Module], Optimizer]):
    model, (x, _) = model_of(), data()
    modules, keys = [*model], [*model.state_dict()]
    biases = [p for key, p in model.named_parameters() if "bias" in key]
    calls = []
    model[0].register_forward_hook(lambda *_: calls.append(1))
    optimizer = make(model)
    relora = ReLoRA(model, optimizer, rank=2, every=4)
    train(model, optimizer, 6)
    assert len(calls) == 6, "a hook runs once"
    outputs = model(x).detach()
    relora.merge()
    assert [*model] == modules and [*model.state_dict()] == keys
    assert all(p.requires_grad for p in model.parameters())
    assert [p for key, p in model.named_parameters() if "bias" in key] == biases
    torch.testing.assert_close(model(x).detach(), outputs, atol=1e-13, rtol=0)
    held = [p for group in optimizer.param_groups for p in group["params"]]
    assert {id(p) for p in held} == {id(p) for p in model.parameters()} and len(held) == 6
    before = [p.detach().clone() for p in model.parameters()]
    train(model, optimizer, 1)
    assert all(not torch.equal(p, old) for p, old in zip(model.parameters(), before, strict=True))
    assert relora.cycle == 1, "it counts no more"


CONVOLUTIONS = {
    "conv1d": (nn.Conv1d(6, 10, 3, stride=2, padding=1), (2, 6, 13)),
    "conv2d": (nn.Conv2d(6, 10, 3, padding=1, padding_mode="circular"), (2, 6, 7, 8)),
    "conv2d, no bias": (nn.Conv2d(6, 10, (3, 1), dilation=2, bias=False), (2, 6, 7, 8)),
    "conv3d": (nn.Conv3d(4, 7, 2), (2, 4, 5, 6, 4)),
}


@pytest.mark.parametrize("name", CONVOLUTIONS)
def test_convolutions_compute_with_the_sum_of_both_weights(name: str):
    dense, shape = CONVOLUTIONS[name]
    model = nn.Sequential(copy.deepcopy(dense).double(), nn.Flatten(), nn.LazyLinear(2).double())
    x = torch.randn(shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    model(x)
    optimizer = torch.optim.Adam(model.parameters(), lr=0.02)
    relora = ReLoRA(model, optimizer, rank=2, every=3, target_modules=["0"])
    for _ in range(5):
        optimizer.zero_grad()
        model(x).square().mean().backward()
        optimizer.step()
    layer: Any = model[0]
    assert layer.kernel_size == dense.kernel_size
    twin: Any = copy.deepcopy(dense).double()
    with torch.no_grad():
        twin.weight.copy_(layer.weight)
    if layer.bias is not None:
        twin.bias = layer.bias
    torch.testing.assert_close(layer(x), twin(x), atol=1e-12, rtol=0)
    relora.merge()
    torch.testing.assert_close(model[0](x), twin(x), atol=1e-12, rtol=0)


@pytest.mark.filterwarnings("ignore:enable_nested_tensor is True")
def test_modules_that_read_the_weight_themselves_see_the_sum():
    torch.manual_seed(0)
    model = nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0, batch_first=True).double()
    x = torch.randn(3, 5, 8, dtype=torch.float64)
    optimizer = torch.optim.Adam(model.parameters(), lr=0.02)
    relora = ReLoRA(model, optimizer, rank=2, every=30, include_head=True)
    assert {*relora.layers} == {"self_attn.out_proj", "linear1", "linear2"}
    for _ in range(4):
        optimizer.zero_grad()
        model(x).square().mean().backward()
        optimizer.step()
    assert all(bool(layer.update.A.any()) for layer in relora.layers.values()), "every update has learnt"  # type: ignore[union-attr]
    trained = model(x).detach()
    model.eval()
    with torch.no_grad():
        torch.testing.assert_close(model(x), trained, atol=1e-12, rtol=0)
        relora.merge()
        torch.testing.assert_close(model(x), trained, atol=1e-12, rtol=0)


def test_a_weight_in_half_precision_takes_the_update_in_float32():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(24, 24)).bfloat16()
    W = model[0].weight.detach().clone()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    relora = ReLoRA(model, optimizer, rank=4, every=9, include_head=True)
    layer: Any = model[0]
    with torch.no_grad():
        layer.update.A.normal_()
    update = layer.update.A.float().T @ layer.update.B.float()
    relora.merge()
    assert torch.equal(model[0].weight, (W.float() + update).bfloat16())


def test_the_weight_is_closed_to_writing():
    model = model_of()
    ReLoRA(model, torch.optim.SGD(model.parameters(), lr=0.1), rank=2, every=3)
    with pytest.raises(RuntimeError, match="read-only"):
        nn.init.zeros_(model[0].weight)  # type: ignore[arg-type]


def test_only_what_is_chosen_trainable_and_worth_it_changes():
    model = model_of()
    model[0].weight.requires_grad_(False)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    assert {*ReLoRA(model, optimizer, rank=2, every=3).layers} == {"2"}, "frozen, chosen, the head"
    model = model_of()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    relora = ReLoRA(model, optimizer, rank=4, every=3, include_head=True)
    assert {*relora.layers} == {"0", "2"}, "factors of rank 4 are larger than a weight of (3, 9)"
    model = model_of()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    assert {*ReLoRA(model, optimizer, rank=1, every=3, exclude_modules=["0"]).layers} == {"2"}


# --- mistakes ----------------------------------------------------------------------------------------------------


def low_rank(model: nn.Module) -> Optimizer:
    factorize_(model, rank=2, target_modules=["0"])
    return LowRankOptimizer(model, lr=0.1)


@pytest.mark.parametrize(
    ("make", "options", "error", "message"),
    [
        (adam, {"rank": 0}, ValueError, "rank and every must be at least 1, got 0 and 5"),
        (adam, {"every": 0}, ValueError, "rank and every must be at least 1, got 2 and 0"),
        (adam, {"warmup": 6}, ValueError, "warmup must be between 0 and every = 5, got 6"),
        (
            adam,
            {"rank": 7},
            ValueError,
            "no layer can be trained by updates of rank 7. Chosen were 0, 2; .* Lower rank",
        ),
        (adam, {"target_modules": ["9"]}, ValueError, "'9' matches no layer"),
        (low_rank, {}, TypeError, "LowRankOptimizer moves low-rank weights itself"),
        (lambda m: torch.optim.Adam(m[0].parameters()), {}, ValueError, r"\(Adam\) does not hold the weights of 2\."),
        (lambda m: torch.optim.LBFGS(m.parameters()), {}, ValueError, "LBFGS keeps one state for all parameters"),
        (lambda m: m, {}, TypeError, "optimizer must be a torch.optim.Optimizer, got Sequential"),
    ],
)
def test_what_cannot_work_is_named_and_changes_nothing(
    make: Any, options: dict[str, Any], error: type[Exception], message: str
):
    model = model_of()
    optimizer = make(model)
    before = [*model.named_modules()]
    with pytest.raises(error, match=message):
        ReLoRA(model, optimizer, **{"rank": 2, "every": 5} | options)
    assert [*model.named_modules()] == before


def test_a_state_of_other_layers_is_refused():
    one, other = (
        ReLoRA(m, adam(m), rank=rank, every=5, include_head=True) for m, rank in ((model_of(), 1), (model_of(), 4))
    )
    with pytest.raises(ValueError, match="the saved state does not fit: 4 are in one only"):
        other.load_state_dict(one.state_dict())
