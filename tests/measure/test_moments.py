"""Moments are those of a plain computation, whatever the layer and however the rows are cut into blocks."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from dynarank.layers.conv1d import LowRankConv1d
from dynarank.layers.conv2d import LowRankConv2d
from dynarank.layers.conv3d import LowRankConv3d
from dynarank.layers.linear import LowRankLinear
from dynarank.measure import Moments, input_moments
from dynarank.measure import _patches as patches

EXACT = {"atol": 1e-12, "rtol": 1e-12}
TWINS = {nn.Linear: LowRankLinear, nn.Conv1d: LowRankConv1d, nn.Conv2d: LowRankConv2d, nn.Conv3d: LowRankConv3d}


def moments_of(layer: nn.Module, *batches: Tensor) -> Moments:
    return input_moments(layer, {"layer": layer}, list(batches))["layer"]


def plain(x: Tensor) -> tuple[Tensor, Tensor]:
    """Return the second moment and the mean of the rows of a matrix, in float64."""
    rows = [row.double() for row in x]
    return sum(torch.outer(row, row) for row in rows) / len(rows), sum(rows) / len(rows)  # type: ignore[return-value]


def rows_of_output(layer: Any, x: Tensor) -> Tensor:
    """Return ``(batch * positions, out_channels)``."""
    y = layer(x)
    batched = y if y.dim() == len(layer.kernel_size) + 2 else y.unsqueeze(0)
    return batched.movedim(1, -1).flatten(0, -2).detach()


@pytest.mark.parametrize("shape", [(4, 7), (3, 5, 7), (7,), (2, 1, 3, 7)])
def test_moments_of_a_linear_layer_are_those_of_its_inputs(shape: tuple[int, ...]):
    x = torch.randn(shape, dtype=torch.float64) + 1
    found = moments_of(nn.Linear(7, 3).double(), x)
    second, mean = plain(x.reshape(-1, 7))
    torch.testing.assert_close((found.second, found.mean), (second, mean), **EXACT)
    assert found.rows == x.numel() // 7


def test_every_row_of_every_batch_counts_alike():
    batches = [torch.randn(rows, 5, dtype=torch.float64) for rows in (1, 4, 2)]
    found = moments_of(nn.Linear(5, 2).double(), *batches)
    torch.testing.assert_close((found.second, found.mean), plain(torch.cat(batches)), **EXACT)


def test_moments_through_a_convolution_are_those_of_its_output(convolution: tuple[Any, Tensor]):
    layer, x = convolution
    found, W, y = moments_of(layer, x), layer.weight.detach().flatten(1), rows_of_output(layer, x)
    second, mean = plain(y)
    torch.testing.assert_close(W @ found.second @ W.mT, second, **EXACT)
    torch.testing.assert_close(W @ found.mean, mean, **EXACT)
    assert found.rows == len(y)


def test_channels_last_changes_nothing(convolution: tuple[Any, Tensor]):
    layer, x = convolution
    found = moments_of(layer, x)
    channel = x.dim() - len(layer.kernel_size) - 1
    strided = x.movedim(channel, -1).contiguous().movedim(-1, channel)  # channels innermost in memory
    again = moments_of(layer, strided)
    torch.testing.assert_close((again.second, again.mean), (found.second, found.mean), **EXACT)


@pytest.mark.parametrize("size", [1, 40, 500])
def test_blocks_of_any_size_give_the_same(convolution: tuple[Any, Tensor], size: int, monkeypatch: Any):
    layer, x = convolution
    found = moments_of(layer, x)
    monkeypatch.setattr(patches, "BLOCK", size)
    again = moments_of(layer, x)
    torch.testing.assert_close((again.second, again.mean), (found.second, found.mean), **EXACT)
    assert again.rows == found.rows
    columns = layer.weight[0].numel()
    shapes = [block.shape for block in patches.blocks(x, patches.patches_of("layer", layer))]
    assert all(rows <= max(1, size // columns) and width == columns for rows, width in shapes)


def test_low_rank_layers_see_what_their_dense_twins_see(convolution: tuple[Any, Tensor]):
    layer, x = convolution
    twin = TWINS[type(layer)].from_dense(layer, rank=2)
    found, again = moments_of(layer, x), moments_of(twin, x)
    torch.testing.assert_close((again.second, again.mean), (found.second, found.mean), **EXACT)
    assert again.rows == found.rows


@pytest.mark.parametrize("form", ["pair", "core"])
def test_a_low_rank_linear_layer_sees_what_its_dense_twin_sees(form: Any):
    layer, x = nn.Linear(7, 5).double(), torch.randn(3, 2, 7, dtype=torch.float64)
    twin = LowRankLinear.from_dense(layer, rank=2)
    twin.set_factors(twin.factors(), form=form)
    torch.testing.assert_close(moments_of(twin, x).second, moments_of(layer, x).second, **EXACT)


def test_a_layer_that_is_called_twice_counts_both_calls():
    layer, x = nn.Linear(5, 5).double(), torch.randn(3, 5, dtype=torch.float64)
    found = input_moments(layer, {"layer": layer}, [x], forward=lambda model, batch: model(model(batch)))["layer"]
    torch.testing.assert_close(found.second, plain(torch.cat([x, layer(x).detach()]))[0], **EXACT)
    assert found.rows == 6


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_narrow_inputs_are_added_up_in_float64(dtype: torch.dtype):
    layer = nn.Linear(5, 3).to(dtype)
    batches = [torch.randn(4, 5).to(dtype) for _ in range(9)]
    found = moments_of(layer, *batches)
    assert found.second.dtype == found.mean.dtype == torch.float64
    torch.testing.assert_close((found.second, found.mean), plain(torch.cat(batches)), atol=1e-6, rtol=1e-6)
    assert torch.equal(found.second, found.second.mT)


def test_autocast_does_not_round_the_moments():
    layer, x = nn.Linear(33, 2), torch.randn(65, 33)

    def forward(model: nn.Module, batch: Tensor) -> None:
        with torch.autocast("cpu", torch.bfloat16):
            model(batch)

    found = input_moments(layer, {"layer": layer}, [x], forward=forward)["layer"]
    torch.testing.assert_close(found.second, plain(x)[0], atol=1e-6, rtol=1e-5)


def test_a_layer_that_only_a_later_batch_reaches_is_counted():
    class Sometimes(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.always, self.late = nn.Linear(3, 4), nn.Linear(4, 2)

        def forward(self, x: Tensor) -> Tensor:
            y = self.always(x)
            return self.late(y) if len(x) > 2 else y

    torch.manual_seed(0)
    model, batches = Sometimes(), [torch.randn(2, 3), torch.randn(5, 3)]
    found = input_moments(model, {"always": model.always, "late": model.late}, batches)
    assert (found["always"].rows, found["late"].rows) == (7, 5)
    torch.testing.assert_close(found["late"].second, plain(model.always(batches[1]).detach())[0], atol=1e-6, rtol=1e-6)


def test_the_spread_of_inputs_far_from_zero_is_kept():
    """In float32, with means ten thousand times the deviation: the covariance is that of float64."""
    generator = torch.Generator().manual_seed(0)
    x = 1e4 + torch.randn(4000, 5, generator=generator) * torch.tensor([1.0, 0.5, 2.0, 1.0, 0.1])
    found = moments_of(nn.Linear(5, 2), x)
    covariance = found.second - torch.outer(found.mean, found.mean)
    torch.testing.assert_close(covariance, x.double().T.cov(correction=0), atol=2e-4, rtol=1e-3)


def test_squares_may_exceed_the_range_of_float32():
    x = torch.randn(4, 5) * 1e25
    found = moments_of(nn.Linear(5, 2), x)
    torch.testing.assert_close(found.second, plain(x)[0], atol=0, rtol=1e-12)


def test_a_batch_without_rows_adds_nothing():
    layer = nn.Linear(5, 2).double()
    x = torch.randn(3, 5, dtype=torch.float64)
    found = moments_of(layer, x[:0], x)
    torch.testing.assert_close((found.second, found.mean), plain(x), **EXACT)
    assert input_moments(layer, {"layer": layer}, [x[:0]]) == {}
