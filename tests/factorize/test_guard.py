"""An optimizer that holds replaced parameters says so at its next step instead of training nothing."""

import gc
import weakref
from typing import Any

import pytest
import torch
from torch import nn, optim

from dynarank.factorize import factorize_, merge_


def network() -> Any:
    return nn.Sequential(nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 4))


def loss_of(model: nn.Module) -> torch.Tensor:
    return model(torch.randn(5, 16)).square().mean()


@pytest.mark.parametrize("build", [optim.AdamW, optim.SGD, optim.Adam])
def test_an_optimizer_built_before_factorize_raises(build: Any):
    model = network()
    optimizer = build(model.parameters(), lr=0.1)
    factorize_(model)
    loss_of(model).backward()
    message = (
        f"this {build.__name__} was built before factorize_ and still holds the dense weight of '0', "
        "which the model no longer uses. Build the optimizer after factorize_."
    )
    for _ in range(2):  # at every step, not only the first
        with pytest.raises(RuntimeError, match=message):
            optimizer.step()


def test_an_optimizer_that_has_stepped_before_raises_too():
    model = network()
    optimizer = optim.AdamW(model.parameters())
    other = network()
    factorize_(other)
    loss_of(model).backward()
    optimizer.step()
    factorize_(model)
    with pytest.raises(RuntimeError, match="this AdamW was built before factorize_"):
        optimizer.step()


def test_a_gradient_scaler_and_a_closure_do_not_hide_it():
    model = network()
    optimizer = optim.SGD(model.parameters(), lr=0.1)
    factorize_(model)
    with pytest.raises(RuntimeError, match="this SGD was built before"):
        optimizer.step(lambda: loss_of(model))


def test_optimizers_built_afterwards_and_of_other_models_step():
    model, other = network(), network()
    before = optim.SGD(other.parameters(), lr=0.1)
    factorize_(model)
    after = optim.SGD(model.parameters(), lr=0.1)
    for net, optimizer in ((model, after), (other, before)):
        weights = [p.detach().clone() for p in net.parameters()]
        for _ in range(2):
            loss_of(net).backward()
            optimizer.step()
        assert not any(torch.equal(old, new) for old, new in zip(weights, net.parameters(), strict=True))


def test_an_optimizer_of_the_parts_that_stay_dense_steps():
    model = network()
    optimizer = optim.SGD(model[2].parameters(), lr=0.1)
    factorize_(model)
    before = model[2].weight.detach().clone()
    loss_of(model).backward()
    optimizer.step()
    assert not torch.equal(model[2].weight, before)


def test_a_layer_that_is_put_back_may_be_trained():
    model = network()
    layer = model[0]
    optimizer = optim.SGD(model.parameters(), lr=0.1)
    factorize_(model)
    model[0] = layer
    before = layer.weight.detach().clone()
    loss_of(model).backward()
    optimizer.step()
    assert not torch.equal(layer.weight, before)


def test_an_optimizer_built_before_merge_raises():
    model = network()
    factorize_(model)
    optimizer = optim.AdamW(model.parameters())
    merge_(model)
    loss_of(model).backward()
    with pytest.raises(RuntimeError, match="this AdamW was built before merge_ and still holds a factor of '0'"):
        optimizer.step()


def test_a_failed_call_does_not_mark_anything():
    model = network()
    optimizer = optim.SGD(model.parameters(), lr=0.1)
    with torch.no_grad():
        model[0].weight[0, 0] = torch.inf
    with pytest.raises(ValueError, match="left the model as it was"):
        factorize_(model)
    with torch.no_grad():
        model[0].weight[0, 0] = 0
    loss_of(model).backward()
    optimizer.step()


def test_old_layers_are_freed_and_can_be_saved(tmp_path: Any):
    model = network()
    old = model[0]
    factorize_(model)
    torch.save(old, tmp_path / "old.pt")
    weight = weakref.ref(old.weight)
    del old
    gc.collect()
    assert weight() is None
