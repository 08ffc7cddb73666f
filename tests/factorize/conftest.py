"""The network that most tests in this folder factorise."""

from collections.abc import Callable
from typing import Any

import pytest
from torch import nn


class Block(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(width, 2 * width)
        self.fc2 = nn.Linear(2 * width, width)

    def forward(self, x: Any) -> Any:
        return x + self.fc2(self.fc1(x).relu())


class Net(nn.Module):
    """Convolution, residual blocks in a list and in a dictionary, and a head."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 16, 3)
        self.norm = nn.BatchNorm2d(16)
        self.blocks = nn.ModuleList([Block(16), Block(16)])
        self.named = nn.ModuleDict({"last": Block(16)})
        self.head = nn.Linear(16, 10)

    def forward(self, x: Any) -> Any:
        x = self.norm(self.conv(x)).relu().mean((2, 3))
        for block in (*self.blocks, *self.named.values()):
            x = block(x)
        return self.head(x)


@pytest.fixture
def net() -> Net:
    return Net()


@pytest.fixture
def new_net() -> Callable[[], Net]:
    """For tests that need several."""
    return Net
