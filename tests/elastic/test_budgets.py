"""A budget of parameters or FLOPs is kept and goes where directions are worth most; the group lasso."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from dynarank.elastic import (
    hierarchical_group_lasso,
    ranks_within_flops,
    ranks_within_parameters,
    set_rank_,
)
from dynarank.factorize import deployed_parameters, factorize_, to_plain_
from dynarank.factors import FactorPair
from dynarank.layers.base import low_rank_layers
from dynarank.layers.linear import LowRankLinear
from dynarank.measure import flops

DOUBLE: Any = {"dtype": torch.float64}


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def planted() -> Any:
    """A convolution and two linear layers; the spectrum of the first linear one falls fast, those of others slowly."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 20, 3, **DOUBLE), nn.Flatten(), nn.Linear(320, 30, **DOUBLE), nn.ReLU())
    model.append(nn.Linear(30, 30, **DOUBLE)).append(nn.Linear(30, 4, **DOUBLE))
    factorize_(model, rank=12, keep_dense_above_break_even=False)
    layer: Any = model[2]
    layer.set_factors(FactorPair(*(torch.logspace(0, -3, 12, **DOUBLE)[:, None] * f for f in (layer.A, layer.B))))
    return model


@pytest.mark.parametrize("fraction", [0.1, 0.2, 0.35])
def test_a_budget_of_parameters_is_kept_and_goes_where_directions_are_worth_most(fraction: float):
    model = planted()
    dense = sum(layer.dense_parameters for layer in low_rank_layers(model).values())
    dense += sum(p.numel() for name, p in model.named_parameters() if not name.endswith((".A", ".B")))
    ranks = ranks_within_parameters(model, fraction)
    assert all(layer.rank == 12 for layer in low_rank_layers(model).values())
    assert ranks["2"] < ranks["4"]
    set_rank_(model, ranks)
    spent = deployed_parameters(model)
    assert spent <= fraction * dense < spent + 350  # the next direction of the largest layer does not fit


@pytest.mark.parametrize("fraction", [0.1, 0.2, 0.35])
def test_a_budget_of_flops_is_kept(fraction: float):
    model, batch = planted(), draw(5, 3, 6, 6)
    dense = nn.Sequential(nn.Conv2d(3, 20, 3), nn.Flatten(), nn.Linear(320, 30), nn.Linear(30, 30), nn.Linear(30, 4))
    allowed = fraction * flops(dense.double(), batch)
    ranks = ranks_within_flops(model, fraction, batch)
    set_rank_(model, ranks)
    to_plain_(model)
    spent = flops(model, batch)
    assert spent <= allowed < spent + 2 * 5 * 16 * 47
    assert ranks["2"] < ranks["4"]


def test_budgets_that_cannot_be_kept_are_refused():
    with pytest.raises(ValueError, match=r"rank 1 everywhere takes .* Allow at least"):
        ranks_within_parameters(planted(), 0.01)
    with pytest.raises(ValueError, match=r"fraction must be between 0 and 1, got 1\.5"):
        ranks_within_flops(planted(), 1.5, draw(5, 3, 6, 6))


def random_layer(m: int, n: int, rank: int) -> LowRankLinear:
    """A layer with spare rows, in no particular gauge."""
    layer = LowRankLinear(n, m, rank=rank, rank_multiple=3, **DOUBLE)
    layer.set_factors(FactorPair(draw(rank, m), draw(rank, n, seed=1)))
    return layer


@pytest.mark.parametrize(("m", "n", "rank"), [(7, 5, 1), (5, 7, 4), (7, 5, 5)])
def test_the_group_lasso_is_the_sum_of_the_norms_of_all_suffixes(m: int, n: int, rank: int):
    layer: Any = random_layer(m, n, rank)
    A, B = (p.detach().clone().requires_grad_() for p in (layer.A, layer.B))
    wanted: Any = sum(factor[k:rank].norm() for factor in (A, B) for k in range(rank))
    found = hierarchical_group_lasso(layer)
    torch.testing.assert_close(found, wanted)
    found.backward()
    wanted.backward()
    torch.testing.assert_close((layer.A.grad, layer.B.grad), (A.grad, B.grad))


def test_empty_directions_have_a_gradient_of_zero():
    layer: Any = random_layer(7, 5, 3)
    with torch.no_grad():
        layer.A[1:] = 0
    hierarchical_group_lasso(layer).backward()
    assert layer.A.grad[0].any() and not layer.A.grad[1:].any()
    assert layer.B.grad[:3].any(dim=1).all()
