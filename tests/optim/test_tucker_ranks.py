"""Convolutions in Tucker form find their multilinear ranks, in any precision and with spare capacity."""

from typing import Any

import pytest
import torch
from torch import nn

from dynarank import tucker
from dynarank.factorize import factorize_
from dynarank.optim.low_rank_optimizer import LowRankOptimizer
from dynarank.ranks.relative_tail import RelativeTail
from dynarank.schedules.periodic import Periodic


def planted(ranks: tucker.Ranks, noise: float, *, dtype: Any, autocast: bool = False, **options: Any) -> Any:
    """Regress the outputs of a convolution of low multilinear rank; return the layer, its error and its rank events."""
    generator = torch.Generator().manual_seed(0)
    kind: dict[str, Any] = {"generator": generator, "dtype": torch.float64}
    W = tucker.from_dense(torch.randn(8, 6, 3, 3, **kind), ranks=ranks).to_dense()
    W = 4 * W / W.norm()
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(6, 8, 3, bias=False))
    factorize_(model, **options, include_head=True, keep_dense_above_break_even=False)
    model.to(dtype)
    optimizer = LowRankOptimizer(
        model,
        lr=0.02,
        integrator="tangent_heavy_ball",
        rank_policy=RelativeTail(0.1),
        schedule=Periodic(every=10, freeze=80),
    )
    events: list[Any] = []
    optimizer.on_rank_event(events.extend)
    for _ in range(120):
        x = torch.randn(8, 6, 6, 6, **kind)
        y = nn.functional.conv2d(x, W) + noise * torch.randn(8, 8, 4, 4, **kind)
        optimizer.zero_grad()
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
            loss = (model(x.to(dtype)).double() - y).square().mean()
        loss.backward()
        optimizer.step()
    layer: Any = model[0]
    return layer, float((layer.to_dense().weight.detach().double() - W).norm() / W.norm()), events


@pytest.mark.parametrize("start", [{"rank_fraction": 0.8}, {"rank": 2}], ids=["from-above", "from-two"])
@pytest.mark.parametrize(
    ("form", "ranks"), [("tucker", (3, 2, None, None)), ("tucker4", (3, 2, 2, 2))], ids=["channels", "all-modes"]
)
def test_truncation_of_every_mode_to_a_tolerance_finds_planted_ranks(form: Any, ranks: Any, start: dict[str, Any]):
    layer, error, events = planted(ranks, 0.02, dtype=torch.float64, conv_form=form, **start)
    assert layer.ranks == ranks
    assert layer.all_capacities == layer.all_ranks
    assert error < 0.02
    assert {"0[out]", "0[in]"} <= {event.layer for event in events}


@pytest.mark.parametrize("multiple", [1, 8])
@pytest.mark.parametrize("way", ["bfloat16", "autocast"])
def test_so_it_does_in_half_precision_and_with_spare_capacity(way: str, multiple: int):
    half = way == "bfloat16"
    options: dict[str, Any] = {"conv_form": "tucker", "rank_fraction": 0.8, "rank_multiple": multiple}
    dtype = torch.bfloat16 if half else torch.float32
    layer, error, _ = planted((3, 2, None, None), 0.02, dtype=dtype, autocast=not half, **options)
    assert layer.core.dtype == dtype
    assert layer.all_ranks == (3, 2)
    assert layer.all_capacities == ((3, 2) if multiple == 1 else (8, 6))
    assert error < 0.03
    assert not layer.core[3:].any()
    assert not layer.in_basis[2:].any()
