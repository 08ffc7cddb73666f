"""A factorised model under plain ``torch.optim`` is plain training of ``U V^T``: it works, too."""

import pytest
import torch
from torch import nn

OPTIMIZERS = {
    "adamw": lambda p: torch.optim.AdamW(p, lr=0.02),
    "fused": lambda p: torch.optim.AdamW(p, lr=0.02, fused=True),
    "foreach": lambda p: torch.optim.AdamW(p, lr=0.02, foreach=True),
    "sgd": lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9),
    "fused sgd": lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9, fused=True),
}


@pytest.mark.parametrize("rank_multiple", [1, 8])
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_fifty_steps_reduce_the_loss(kit, name, rank_multiple):
    model = kit.make_model(dtype=torch.float32, rank_multiple=rank_multiple)
    losses = kit.train(model, OPTIMIZERS[name](model.parameters()), [0] * 50)
    assert sum(losses[-10:]) < 0.7 * sum(losses[:10])
    assert model[0].rank == 3 and not model[0].A[3:].any() and not model[0].B[3:].any()


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_convolutions_train_too(kit, name):
    model = kit.make_conv_model(dtype=torch.float32)
    optimizer = OPTIMIZERS[name](model.parameters())
    x, y = torch.randn(16, 2, 5, 5), torch.randint(0, 3, (16,))
    losses = []
    for _ in range(50):
        optimizer.zero_grad()
        loss = nn.functional.cross_entropy(model(x), y)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.5 * losses[0]


def test_plain_training_may_be_followed_by_low_rank_training(kit):
    model = kit.make_model(dtype=torch.float32)
    first = kit.train(model, OPTIMIZERS["fused"](model.parameters()), [0] * 10)
    second = kit.train(model, kit.make_optimizer(model), [0] * 60)
    assert sum(second[-10:]) < sum(first[-10:])
