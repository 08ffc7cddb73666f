"""A compiled model trains while its ranks change: graphs are counted, numbers are those of the run in eager mode."""

from typing import Any

import pytest
import torch

UP_AND_DOWN = (9, 3, 16, 7)
EXACT = {"atol": 1e-12, "rtol": 1e-12}


def same(run: Any, eager: Any) -> None:
    torch.testing.assert_close(torch.stack(run.losses), torch.stack(eager.losses), **EXACT)
    for ours, theirs in zip(run.model.parameters(), eager.model.parameters(), strict=True):
        torch.testing.assert_close(ours, theirs, **EXACT)


def test_ranks_within_the_capacity_change_without_a_new_graph(case: Any, graphs: Any):
    run, eager = case.start(graphs), case.start()
    run.steps()
    eager.steps()
    assert graphs.counts == (1, 1, 0)
    for rank in UP_AND_DOWN:
        run.train_at(rank)
        eager.train_at(rank)
        assert run.capacities == {16} and graphs.counts == (1, 1, 0)
    same(run, eager)


def test_autocast(case: Any, graphs: Any):
    run, eager = (case.start(backend, dtype=torch.float32) for backend in (graphs, None))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        for rank in (4, *UP_AND_DOWN):
            run.train_at(rank)
            eager.train_at(rank)
    assert graphs.counts == (1, 1, 0)
    # Compiled code rounds to bfloat16 at fewer places, so that later steps part.
    torch.testing.assert_close(run.losses[0], eager.losses[0], atol=0, rtol=0.02)


def test_evaluation_has_a_graph_of_its_own_and_training_keeps_its(case: Any, graphs: Any):
    run = case.start(graphs)
    run.steps()
    for rank in UP_AND_DOWN:
        run.train_at(rank)
        run.network.eval()
        with torch.no_grad():
            y = run.network(run.x)
            torch.testing.assert_close(y, run.model(run.x), **EXACT)
        run.network.train()
    assert graphs.counts == (1, 1, 1)


def gradients(run: Any, network: Any) -> list[torch.Tensor]:
    run.optimizer.zero_grad()
    loss = (network(run.x) - 1).square().mean()
    loss.backward()
    return [loss.detach(), *(p.grad.clone() for p in run.model.parameters() if p.grad is not None)]


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # of the default backend, about itself
def test_the_default_backend_computes_the_same(case: Any):
    seen = torch._dynamo.utils.counters["stats"]
    run, before = case.start("inductor"), seen["unique_graphs"]
    for rank, graphs in ((4, 1), (9, 1), (3, 1), (16, 1), (20, 2), (7, 2)):
        run.train_at(rank)
        # At the same point: steps along orthogonalised momentum let two runs part by more than rounding.
        torch.testing.assert_close(gradients(run, run.network), gradients(run, run.model), **EXACT)
        assert seen["unique_graphs"] == before + graphs
    torch.compiler.reset()
