"""Ranks that leave the capacity compile a graph for each capacity, and parameters of dynamic shape hardly any."""

from typing import Any

import torch

GROWTH = (16, 17, 31, 33, 48, 49, 64)
EXACT = {"atol": 1e-12, "rtol": 1e-12}


def same(run: Any, eager: Any) -> None:
    torch.testing.assert_close(torch.stack(run.losses), torch.stack(eager.losses), **EXACT)
    for ours, theirs in zip(run.model.parameters(), eager.model.parameters(), strict=True):
        torch.testing.assert_close(ours, theirs, **EXACT)


def test_every_capacity_is_compiled_once(wide: Any, graphs: Any):
    run, eager = wide.start(graphs), wide.start()
    for rank in (4, *GROWTH):
        run.train_at(rank)
        eager.train_at(rank)
    assert run.capacities == {64} and graphs.counts == (4, 4, 0)
    for rank in (30, 5, 40):
        run.train_at(rank)
        eager.train_at(rank)
    assert graphs.counts == (4, 4, 0)
    same(run, eager)


def test_a_capacity_may_be_as_large_as_the_largest_rank_wanted(wide: Any, graphs: Any):
    run = wide.start(graphs, rank_multiple=64)
    for rank in GROWTH:
        run.train_at(rank)
        assert run.capacities == {64}
    assert graphs.counts == (1, 1, 0)


def test_parameters_of_dynamic_shape_need_few_graphs_for_any_number_of_ranks(wide: Any, graphs: Any):
    with torch._dynamo.config.patch(force_parameter_static_shapes=False):
        run, eager = wide.start(graphs, rank_multiple=1), wide.start(rank_multiple=1)
        for rank in (4, *GROWTH, 30, 5):
            run.train_at(rank)
            eager.train_at(rank)
            assert run.capacities == {rank}
    assert graphs.forward <= 3  # the first rank, any rank, and any rank at which W is multiplied out
    same(run, eager)


def test_frozen_ranks_compile_once_more_at_most(wide: Any, graphs: Any):
    run = wide.start(graphs)
    run.train_at(20)
    before = graphs.forward
    run.policy.rank[0] = 40
    run.optimizer.change_ranks()  # candidates that no step has seen
    run.policy.rank[0] = 37
    run.optimizer.freeze_ranks()
    assert run.ranks == {37} and run.capacities == {48}
    run.steps(3)
    assert graphs.forward == before + 1
    run.optimizer.freeze_ranks()
    run.steps()
    assert graphs.forward == before + 1
