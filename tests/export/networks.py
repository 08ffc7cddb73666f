"""The networks of these tests, by name, each with a batch. The last three need torch alone."""

import importlib
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn


class Language(nn.Module):
    """A tiny language model whose head is the embedding."""

    def __init__(self) -> None:
        super().__init__()
        self.tokens = nn.Embedding(19, 16)
        self.up, self.down = nn.Linear(16, 40), nn.Linear(40, 16)
        self.head = nn.Linear(16, 19, bias=False)
        self.head.weight = self.tokens.weight

    def forward(self, tokens: Tensor) -> Tensor:
        return self.head(self.down(self.up(self.tokens(tokens)).relu()))


class Vision(nn.Module):
    """Convolutions with batch normalisation, a layer that is used twice, and a buffer that no state dict holds."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 12, 3, padding=1)
        self.norm = nn.BatchNorm2d(12)
        self.wide = nn.Conv2d(12, 24, (3, 1), stride=2, bias=False)
        self.mix = nn.Linear(24, 24)
        self.head = nn.Linear(24, 7)
        self.register_buffer("scale", torch.tensor(0.5), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        x = self.wide(self.norm(self.conv(x)).relu()).mean((2, 3)) * self.scale
        return self.head(self.mix(self.mix(x).relu()).relu())


def _encoder() -> nn.Module:
    return nn.TransformerEncoder(nn.TransformerEncoderLayer(16, 2, 40, batch_first=True), 2)


def _model(name: str, *sizes: Any, **options: Any) -> Callable[[], nn.Module]:
    # Imported when it is built: some tests run this file where dynarank cannot be imported.
    return lambda: getattr(importlib.import_module("dynarank.models"), name)(*sizes, **options)


NETWORKS: dict[str, tuple[Callable[[], nn.Module], Callable[[], Tensor]]] = {
    "mlp": (_model("MLP", 20, (32, 24), 5), lambda: torch.randn(3, 20)),
    "lenet5": (_model("LeNet5", (6, 12), hidden=40, image=16), lambda: torch.randn(3, 1, 16, 16)),
    "resnet20": (_model("ResNet20", (4, 8, 16)), lambda: torch.randn(2, 3, 16, 16)),
    "gpt": (_model("GPT", 17, layers=2, heads=2, width=16, context=12), lambda: torch.randint(0, 17, (2, 9))),
    "encoder": (_encoder, lambda: torch.randn(3, 7, 16)),
    "language": (Language, lambda: torch.randint(0, 19, (2, 9))),
    "vision": (Vision, lambda: torch.randn(2, 3, 8, 8)),
}


def build(name: str) -> nn.Module:
    """Return a network in eval mode."""
    return NETWORKS[name][0]().eval()


def batch(name: str) -> Tensor:
    """Return inputs for a network."""
    return NETWORKS[name][1]()
