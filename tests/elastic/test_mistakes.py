"""Bad input gets one clear message."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from dynarank.elastic import (
    Elastic,
    Fractions,
    hierarchical_group_lasso,
    order_,
    ranks_within_parameters,
    set_rank_,
)
from dynarank.layers.conv2d_tucker import LowRankTuckerConv2d
from dynarank.layers.linear import LowRankLinear


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def tucker() -> nn.Module:
    return nn.Sequential(LowRankTuckerConv2d(4, 5, 3, ranks=(2, 2)), nn.Flatten(), LowRankLinear(5, 3, rank=2))


@pytest.mark.parametrize(
    "call",
    [Elastic, lambda m: set_rank_(m, 0.5), order_, hierarchical_group_lasso, lambda m: ranks_within_parameters(m, 0.5)],
)
def test_models_without_an_order_of_directions_are_refused(call: Any):
    with pytest.raises(ValueError, match=r"found no low-rank layer in the model\. Call factorize_"):
        call(nn.Linear(3, 2))
    with pytest.raises(ValueError, match=r"0 in Tucker form.* conv_form='matrix'"):
        call(tucker())


@pytest.mark.parametrize("fraction", [0.0, -0.5, 1.5, float("nan")])
def test_fractions_out_of_range_are_refused(fraction: float, network: Any):
    model = network()
    calls = (
        lambda: Fractions((0.5, fraction)),
        lambda: set_rank_(model, fraction),
        lambda: Elastic(model).switch_(fraction),
        lambda: Elastic(model).at(fraction).__enter__(),
    )
    for call in calls:
        with pytest.raises(ValueError, match=f"a fraction of the ranks must be above 0 and at most 1, got {fraction}"):
            call()


@pytest.mark.parametrize(
    ("ranks", "message"),
    [
        ({"1": 2}, "'1' is no low-rank layer of the model. There are: 0, 2"),
        ({"0": 9}, "the rank of 0 must be between 1 and 8, its rank, got 9"),
        ({"2": 0}, "the rank of 2 must be between 1 and 8, its rank, got 0"),
    ],
)
def test_ranks_that_do_not_fit_are_refused(ranks: dict[str, int], message: str, network: Any):
    model = network()
    for call in (lambda: set_rank_(model, ranks), lambda: Elastic(model).switch_(ranks)):
        with pytest.raises(ValueError, match=message):
            call()


def test_other_mistakes_are_named(network: Any):
    with pytest.raises(ValueError, match="at least one fraction"):
        Fractions(())
    with pytest.raises(ValueError, match="imitate needs the outputs of the full rank"):
        Elastic(network(), full=False, imitate=functional.mse_loss)
    core = network()
    core[0].set_factors(core[0].factors())
    with pytest.raises(ValueError, match=r"0 is in the core form, .* optimizer\.freeze_ranks"):
        hierarchical_group_lasso(core)
