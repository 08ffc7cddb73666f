"""A network with two low-rank layers, and how to tell that it has not changed."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from dynarank.factorize import factorize_

Unchanged = Callable[[nn.Module, dict[str, Tensor]], None]


@pytest.fixture
def network() -> Callable[..., Any]:
    """Builds a network of two low-rank layers, with batch normalisation after the first if asked for."""

    def build(*, rank: int = 8, norm: bool = False) -> Any:
        torch.manual_seed(0)
        middle = [nn.BatchNorm1d(15)] if norm else []
        model = nn.Sequential(nn.Linear(12, 15), *middle, nn.ReLU(), nn.Linear(15, 11)).double()
        factorize_(model, rank=rank, include_head=True, keep_dense_above_break_even=False)
        return model

    return build


@pytest.fixture
def bits() -> Callable[[nn.Module], dict[str, Tensor]]:
    """Copies all that is in a state dict."""
    return lambda model: {name: tensor.clone() for name, tensor in model.state_dict().items()}


@pytest.fixture
def assert_same_bits() -> Unchanged:
    """Compares a state dict with a copy, to the last bit."""

    def check(model: nn.Module, before: dict[str, Tensor]) -> None:
        after = model.state_dict()
        assert after.keys() == before.keys()
        assert all(torch.equal(after[name], tensor) for name, tensor in before.items())

    return check


@pytest.fixture
def truncated() -> Callable[[Any, int], Any]:
    """Returns the dense twin of a layer with the truncated SVD of its weight."""

    def cut(layer: Any, rank: int) -> Any:
        dense = layer.to_dense()
        U, sigma, Vh = torch.linalg.svd(layer.as_matrix(dense.weight.detach()), full_matrices=False)
        matrix = U[:, :rank] @ torch.diag(sigma[:rank]) @ Vh[:rank]
        dense.weight = nn.Parameter(layer.as_weight(matrix).clone())
        return dense

    return cut
