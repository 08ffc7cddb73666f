"""A task of your own for ``dynarank compress``: copy this file and put your network and data in their places.

    dynarank compress examples/my_task.py --budget 0.4 --recover 600 --distil --student
    dynarank compress examples/my_task.py --tolerate 0.01
    dynarank evaluate examples/my_task.py --compressed runs/compressed-my_task-1

Only ``model`` must be there; without the others there is less to see. The handwritten digits need scikit-learn.
"""

from functools import cache
from pathlib import Path

import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from dynarank.data import DataSplits, load_digits_data

WEIGHTS = Path("runs/my_task.pt")

measure = "accuracy"  # the name of what evaluate returns
higher_is_better = True


@cache
def data() -> DataSplits:
    """The digits, loaded once."""
    return load_digits_data()


def network(width: int = 256) -> nn.Module:
    """The architecture."""
    return nn.Sequential(nn.Linear(64, width), nn.ReLU(), nn.Linear(width, width), nn.ReLU(), nn.Linear(width, 10))


def model() -> nn.Module:
    """Return the trained network. Yours is loaded from its file; this one is trained in a few seconds at first."""
    net = network()
    if not WEIGHTS.exists():
        optimizer = torch.optim.Adam(net.parameters(), lr=1e-3)
        for _ in range(30):
            for batch in training_batches(seed=0):
                optimizer.zero_grad()
                loss(net(batch[0]), batch).backward()
                optimizer.step()
        WEIGHTS.parent.mkdir(exist_ok=True)
        torch.save(net.state_dict(), WEIGHTS)
    net.load_state_dict(torch.load(WEIGHTS, weights_only=True))
    return net


def training_batches(seed: int) -> DataLoader:
    """Return batches for recovery; a loader that ends is gone through again."""
    samples = TensorDataset(data().train_inputs.flatten(1), data().train_targets)
    return DataLoader(samples, batch_size=64, shuffle=True, generator=torch.Generator().manual_seed(seed))


def loss(outputs: torch.Tensor, batch: tuple[torch.Tensor, torch.Tensor]) -> torch.Tensor:
    """Return the loss of the outputs on a batch, here ``(inputs, targets)``."""
    return nn.functional.cross_entropy(outputs, batch[1])


def evaluate(model: nn.Module) -> float:
    """Return the accuracy on the test data."""
    return accuracy(model, "test")


def validate(model: nn.Module) -> float:
    """Return the accuracy on other data, by which ``--tolerate`` chooses the size."""
    return accuracy(model, "validation")


def accuracy(model: nn.Module, part: str) -> float:
    """Return the part of the digits that are recognised."""
    inputs, targets = data().part(part)
    return float((model(inputs.flatten(1)).argmax(1) == targets).float().mean())


def narrower(parameters: int) -> nn.Module:
    """Return the widest network of at most so many parameters: what a compressed one has to beat."""
    sizes = ((width, sum(p.numel() for p in network(width).parameters())) for width in range(1, 257))
    return network(max(width for width, size in sizes if size <= parameters))
