"""Muon and AdamW as one optimizer take the steps of each on its own part."""

import torch
from torch import Tensor, nn

from dynarank.dense_start.oialr import oialr
from dynarank.experiments.muon import Muon, MuonAdamW
from dynarank.layers.base import low_rank_layers

MUON, ADAMW = {"lr": 0.02, "weight_decay": 0.1}, {"lr": 1e-3, "weight_decay": 0.01}


def network() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(20, 16), nn.ReLU(), nn.Linear(16, 5)).double()


def train(model: nn.Module, *optimizers: torch.optim.Optimizer, steps: int = 12) -> None:
    x = torch.randn(30, 20, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    for _ in range(steps):
        for optimizer in optimizers:
            optimizer.zero_grad()
        model(x).square().mean().backward()
        for optimizer in optimizers:
            optimizer.step()


def both(model: nn.Sequential, *matrices: Tensor) -> MuonAdamW:
    return MuonAdamW(model.parameters(), matrices=matrices, muon=MUON, adamw=ADAMW)


def test_each_part_moves_as_by_its_own_optimizer():
    one, other = network(), network()
    train(one, both(one, one[0].weight))
    rest = [p for p in other.parameters() if p is not other[0].weight]
    train(other, Muon([other[0].weight], **MUON), torch.optim.AdamW(rest, **ADAMW))
    for a, b in zip(one.parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(a, b, atol=0, rtol=0)


def test_without_matrices_it_is_adamw():
    one, other = network(), network()
    train(one, both(one))
    train(other, torch.optim.AdamW(other.parameters(), **ADAMW))
    for a, b in zip(one.parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(a, b, atol=0, rtol=0)


def test_a_core_in_the_place_of_a_matrix_is_moved_by_muon_and_a_run_goes_on_from_its_state():
    model = network()
    optimizer = both(model, model[0].weight)
    oialr(model, optimizer, delay=4, every=4, beta=0.5, keep_dense=False, window=None)
    train(model, optimizer, steps=14)  # refreshes after 8 and 12 give the core a fresh state
    (layer,) = low_rank_layers(model).values()
    group = next(group for group in optimizer.param_groups if any(p is layer.S for p in group["params"]))
    assert group["kind"] == "Muon" and "momentum" in optimizer.state[layer.S]
    before, saved = layer.S.detach().clone(), optimizer.state_dict()
    optimizer.load_state_dict(saved)
    train(model, optimizer, steps=1)
    assert not torch.equal(layer.S, before)
