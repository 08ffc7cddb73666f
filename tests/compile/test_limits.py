"""What compiles anew although the capacity stays, and what stands against another capacity."""

from typing import Any

import pytest
import torch

from dynarank import LowRankOptimizer
from dynarank.layers.base import low_rank_layers
from dynarank.schedules.periodic import Periodic


def train(run: Any, integrator: str, ranks: tuple[int, ...]) -> None:
    """Hold a rank event every five steps, before those at the next rank."""
    options: dict[str, Any] = {"rank_policy": run.policy, "schedule": Periodic(5)}
    optimizer = LowRankOptimizer(run.model, lr=0.001, integrator=integrator, **options)

    def closure() -> torch.Tensor:
        optimizer.zero_grad()
        loss = (run.network(run.x) - 1).square().mean()
        loss.backward()
        return loss

    for rank in ranks:
        run.policy.rank[0] = rank
        for _ in range(5):
            optimizer.step(closure)


@pytest.mark.parametrize("integrator", ["augmented_bug", "unconventional_bug", "abc_psi"])
@pytest.mark.parametrize("dynamic", [False, True])
def test_core_form_and_several_gradients(linear: Any, graphs: Any, integrator: str, dynamic: bool):
    ranks = (4, 9, 3, 7)
    with torch._dynamo.config.patch(force_parameter_static_shapes=not dynamic):
        train(linear.start(graphs), integrator, ranks)
    if dynamic:
        assert graphs.forward <= 4  # two forms, the first rank and any rank
    else:
        assert 3 <= graphs.forward <= 1 + len(ranks)


def test_every_active_rank_has_a_graph(linear: Any, graphs: Any):
    run = linear.start(graphs)
    for active in (None, 1, 2, 3, None, 2):
        for layer in low_rank_layers(run.model).values():
            layer.active_rank = active
        run.network(run.x).sum().backward()
    assert graphs.counts == (4, 4, 0)


def test_a_backend_of_ones_own_keeps_the_capacity_until_told(linear: Any, graphs: Any):
    with torch._dynamo.config.patch(invalidate_compile_context_weakrefs=None):
        run = linear.start(graphs)
        run.steps()
        run.policy.rank[0] = 20
        event, *_ = run.optimizer.change_ranks()
    assert run.capacities == {16} and "a compile backend of your own, holds a weak reference" in event.reason
