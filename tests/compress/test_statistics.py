"""Renewed statistics are the means over the batches; everything else, and every failure, leaves the model alone."""

import copy
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from dynarank.compress import compress_, renew_statistics_
from dynarank.compress.statistics import rehearse, renew_where_better_

EXACT = {"atol": 1e-12, "rtol": 1e-12}


class Net(nn.Module):
    """Two normalisations in a row, one that nobody calls and one without statistics."""

    def __init__(self) -> None:
        super().__init__()
        kind: dict[str, Any] = {"dtype": torch.float64}
        self.conv = nn.Conv2d(3, 8, 3, **kind)
        self.norm = nn.BatchNorm2d(8, momentum=0.3, **kind)
        self.drop = nn.Dropout(0.5)
        self.fc = nn.Linear(8, 12, **kind)
        self.last = nn.BatchNorm1d(12, momentum=None, **kind)
        self.idle = nn.BatchNorm1d(12, **kind)
        self.bare = nn.BatchNorm1d(12, track_running_stats=False, **kind)
        self.head = nn.Linear(12, 4, **kind)
        self.idle.running_mean.fill_(7)  # type: ignore[union-attr]

    def forward(self, x: Tensor) -> Tensor:
        x = self.drop(self.norm(self.conv(x)).relu().mean((2, 3)))
        return self.head(self.bare(self.last(self.fc(x)).relu()))


@pytest.fixture
def net() -> Net:
    net = Net().train()
    net.norm.eval()  # frozen by its owner
    return net


def images(*sizes: int) -> list[Tensor]:
    return [torch.randn(size, 3, 6, 5, dtype=torch.float64) * 2 + 1 for size in sizes]


def plain_statistics(net: Net, batches: list[Tensor]) -> dict[str, tuple[Tensor, Tensor]]:
    """Means and unbiased variances of each batch, with each batch normalised by its own, averaged over the batches."""
    found: dict[str, list[tuple[Tensor, Tensor]]] = {"norm": [], "last": []}
    for x in batches:
        y = net.conv(x)
        rows = y.movedim(1, -1).flatten(0, -2)
        found["norm"].append((rows.mean(0), rows.var(0)))
        mean, var = rows.mean(0), rows.var(0, unbiased=False)
        z = (y - mean[:, None, None]) / (var[:, None, None] + net.norm.eps).sqrt()
        z = z * net.norm.weight[:, None, None] + net.norm.bias[:, None, None]
        h = net.fc(z.relu().mean((2, 3)))
        found["last"].append((h.mean(0), h.var(0)))
    return {
        name: (torch.stack([m for m, _ in parts]).mean(0), torch.stack([v for _, v in parts]).mean(0))
        for name, parts in found.items()
    }


@pytest.mark.parametrize("sizes", [(5,), (5, 5, 5), (7, 3)])
def test_statistics_are_the_means_over_the_batches(net: Any, sizes: tuple[int, ...]):
    batches = images(*sizes)
    assert renew_statistics_(net, batches) == 2
    for name, (mean, var) in plain_statistics(net, batches).items():
        layer = net.get_submodule(name)
        torch.testing.assert_close((layer.running_mean, layer.running_var), (mean.detach(), var.detach()), **EXACT)
        assert int(layer.num_batches_tracked) == len(sizes)


def test_a_layer_that_nobody_calls_keeps_its_statistics(net: Any):
    renew_statistics_(net, images(4, 4))
    assert net.idle.running_mean.tolist() == 12 * [7] and net.idle.running_var.tolist() == 12 * [1]


def test_everything_else_stays_as_it_was(net: Any, state_of: Any):
    batches = images(4, 4)
    kept = [batch.clone() for batch in batches]
    before = state_of(net)
    renew_statistics_(net, batches)
    after = state_of(net)
    assert [part for i, part in enumerate(after) if i != 2] == [part for i, part in enumerate(before) if i != 2]
    values = {name for name in before[2] if before[2][name] != after[2][name]}
    assert {name.split(".")[1] for name in values} <= {"running_mean", "running_var", "num_batches_tracked"}
    assert net.norm.momentum == 0.3 and net.last.momentum is None
    assert all(map(torch.equal, batches, kept))


def test_batches_may_come_from_an_iterator_and_through_a_forward(net: Any):
    batches, other = images(4, 5), copy.deepcopy(net)
    renew_statistics_(net, batches)
    renew_statistics_(other, ({"images": x} for x in batches), forward=lambda model, batch: model(batch["images"]))
    assert all(torch.equal(a, b) for a, b in zip(net.buffers(), other.buffers(), strict=True))


def test_a_model_without_running_statistics_does_not_touch_the_batches():
    def batches() -> Iterator[Tensor]:
        raise AssertionError
        yield

    for model in (nn.Linear(3, 3), nn.BatchNorm1d(3, track_running_stats=False), nn.LayerNorm(3)):
        assert renew_statistics_(model, batches()) == 0


FAILURES: dict[str, Any] = {
    "no batch": ([], "batches holds no batch"),
    "one value per channel": (images(4, 1), r"batch 1 of shape \(1, 3, 6, 5\) does not fit the model: Expected more"),
    "a wrong shape": ([*images(4), torch.ones(4, 2, 6, 5, dtype=torch.float64)], r"batch 1 of shape \(4, 2, 6, 5\)"),
}


@pytest.mark.parametrize(("batches", "message"), FAILURES.values(), ids=FAILURES.keys())
def test_a_failure_puts_everything_back(net: Any, state_of: Any, batches: Any, message: str):
    before = state_of(net)
    for function in (renew_statistics_, rehearse):
        with pytest.raises(ValueError, match=message):
            function(net, batches)
        assert state_of(net) == before


def test_an_interruption_puts_everything_back(net: Any, state_of: Any):
    def batches() -> Iterator[Tensor]:
        yield from images(4, 4)
        raise KeyboardInterrupt

    before = state_of(net)
    with pytest.raises(KeyboardInterrupt):
        renew_statistics_(net, batches())
    assert state_of(net) == before


def test_a_rehearsal_changes_nothing(net: Any, state_of: Any):
    batches, before = images(4, 4), state_of(net)
    rehearse(net, batches)
    assert state_of(net) == before


@pytest.mark.parametrize("better", [True, False])
def test_statistics_are_kept_only_where_that_is_better(net: Any, state_of: Any, better: bool):
    batches, before, renewed = images(4, 4), state_of(net), copy.deepcopy(net)
    distances = iter([1.0, 0.5] if better else [0.5, 0.5])
    assert renew_where_better_(net, batches, lambda: next(distances)) is better
    renew_statistics_(renewed, batches)
    if better:
        assert all(torch.equal(a, b) for a, b in zip(net.buffers(), renewed.buffers(), strict=True))
    else:
        assert state_of(net) == before


def test_without_normalisation_nothing_is_measured():
    def distance() -> float:
        raise AssertionError

    assert renew_where_better_(nn.Linear(3, 3), [], distance) is False


# --- in compress_ ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("renew", [True, False, None])
@pytest.mark.parametrize("measured", [True, False])
def test_compress_renews_when_told_or_when_it_helps(net: Any, renew: Any, measured: bool):
    data, old = images(8, 8), copy.deepcopy(net)
    compress_(net, 0.75, calibration=data, renew_statistics=renew, measured_sensitivity=measured)
    mean, expected = net.norm.running_mean, copy.deepcopy(net)
    renew_statistics_(expected, data)
    kept, renewed = torch.equal(mean, old.norm.running_mean), torch.equal(mean, expected.norm.running_mean)
    assert (kept, renewed) in ((True, False), (False, True))
    if renew is not None:
        assert renewed is renew
    if renew is None:  # these statistics were never fitted, so that any are better; unmeasured, new ones are taken
        assert renewed or measured


@pytest.mark.parametrize("renew", [True, None])
def test_compress_refuses_before_anything_is_changed(net: Any, state_of: Any, renew: Any):
    net.bare = nn.Identity()  # which needs several values per channel in evaluation mode too
    data, before = images(4, 1), state_of(net)
    with pytest.raises(ValueError, match=r"calibration batch 1 of .* Pass other batches, or renew_statistics=False."):
        compress_(net, 0.75, calibration=data, renew_statistics=renew)
    assert state_of(net) == before
    assert compress_(net, 0.75, calibration=data, renew_statistics=False).compressed
