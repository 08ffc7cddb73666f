"""Laws of what a weight costs, by counting the entries of the tensors themselves."""

import pytest
import torch

from dynarank import cost

SHAPES = [(7, 5), (5, 7), (6, 6), (1, 9), (2, 2), (20, 25)]


@pytest.mark.parametrize(("m", "n"), SHAPES)
def test_factors_are_counted_entry_by_entry(m: int, n: int):
    assert cost.dense_parameters(m, n) == torch.empty(m, n).numel()
    for rank in range(1, min(m, n) + 1):
        pair = torch.empty(rank, m).numel() + torch.empty(rank, n).numel()
        assert cost.factor_parameters(m, n, rank) == pair
        assert cost.deployed_parameters(m, n, rank) == min(pair, m * n)


@pytest.mark.parametrize(("m", "n"), SHAPES)
def test_break_even_is_the_last_rank_that_pays(m: int, n: int):
    paying = [rank for rank in range(min(m, n) + 1) if rank * (m + n) < m * n]
    assert cost.break_even_rank(m, n) == max(paying)


@pytest.mark.parametrize("multiple", [1, 3, 8])
def test_round_up_is_the_next_multiple(multiple: int):
    for rank in range(1, 30):
        rounded = cost.round_up(rank, multiple)
        assert rounded % multiple == 0 and rank <= rounded < rank + multiple
