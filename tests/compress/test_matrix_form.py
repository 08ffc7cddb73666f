"""The matrix form is the best approximation of its rank, and its reported errors are those of explicit inputs."""

from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from dynarank import cost
from dynarank.compress.forms.base import Options
from dynarank.compress.forms.matrix import Matrix
from dynarank.factors import FactorPair
from dynarank.layers.conv2d import LowRankConv2d
from dynarank.layers.linear import LowRankLinear
from dynarank.measure import Moments, input_moments, trace

EXACT = {"atol": 1e-11, "rtol": 1e-9}
BEYOND = 1e-6  # how far below the best error rounding may take the one that was reached, relatively


@dataclass(frozen=True)
class Case:
    """A layer and the shape of its input."""

    cls: Any
    sizes: tuple[Any, ...]
    shape: tuple[int, ...]
    options: dict[str, Any] = field(default_factory=dict)

    def build(self, **more: Any) -> Any:
        return self.cls(*self.sizes, **{"dtype": torch.float64} | self.options | more)

    def inputs(self) -> Tensor:
        """Inputs that are neither centred nor of one size."""
        x = torch.randn(self.shape, dtype=torch.float64)
        return x * torch.linspace(0.1, 3, self.shape[-1], dtype=torch.float64) + 0.5


CASES = {
    "tall": Case(nn.Linear, (7, 12), (40, 7)),
    "wide": Case(nn.Linear, (12, 7), (40, 12)),
    "square": Case(nn.Linear, (9, 9), (5, 8, 9)),
    "tall-no-bias": Case(nn.Linear, (7, 12), (40, 7), {"bias": False}),
    "wide-no-bias": Case(nn.Linear, (12, 7), (40, 12), {"bias": False}),
    "conv1d": Case(nn.Conv1d, (4, 9, 3), (6, 4, 11), {"stride": 2, "padding": 1}),
    "conv2d": Case(nn.Conv2d, (3, 8, 3), (4, 3, 7, 6), {"padding": (1, 2), "stride": (2, 1)}),
    "conv2d-no-bias": Case(nn.Conv2d, (3, 8, (3, 2)), (4, 3, 7, 6), {"bias": False, "dilation": 2}),
    "conv2d-reflect": Case(nn.Conv2d, (3, 8, 3), (4, 3, 7, 6), {"padding": 1, "padding_mode": "reflect"}),
    "conv2d-circular": Case(nn.Conv2d, (2, 30, 3), (4, 2, 7, 6), {"padding": "same", "padding_mode": "circular"}),
    "conv2d-unbatched": Case(nn.Conv2d, (3, 8, 3), (3, 9, 8), {"padding_mode": "replicate", "padding": 1}),
    "conv3d": Case(nn.Conv3d, (2, 7, 2), (3, 2, 4, 3, 5), {"padding": (1, 0, 1)}),
}
LINEAR = ("tall", "wide", "square", "tall-no-bias", "wide-no-bias")


@pytest.fixture(params=CASES.values(), ids=CASES.keys())
def case(request: pytest.FixtureRequest) -> Case:
    return request.param


@pytest.fixture(params=LINEAR)
def linear(request: pytest.FixtureRequest) -> Case:
    return CASES[request.param]


def matrix(layer: Any) -> Tensor:
    """The weight as a matrix, outputs by everything else."""
    return layer.weight.detach().as_subclass(Tensor).flatten(1)


def moments_of(layer: nn.Module, x: Tensor) -> Moments:
    return input_moments(layer, {"layer": layer}, [x])["layer"]


def offered(layer: nn.Module, moments: Moments | None = None) -> Options:
    return Matrix().options(layer, moments, None)


def some_ranks(options: Options) -> list[int]:
    """The smallest rank, one between and the largest: 1 and the break-even rank of a dense layer."""
    ranks = [rank for (rank,) in options.ranks]
    return sorted({ranks[0], ranks[len(ranks) // 2], ranks[-1]})


def rows_of(layer: Any, y: Tensor) -> Tensor:
    """Outputs as ``(rows, m)``."""
    if isinstance(layer, nn.Linear):
        return y.flatten(0, -2).detach()
    dimensions = len(layer.kernel_size)
    batched = y if y.dim() == dimensions + 2 else y.unsqueeze(0)
    return batched.movedim(1, -1).flatten(0, -2).detach()


def metric_of(layer: Any, moments: Moments) -> Tensor:
    mean = torch.outer(moments.mean, moments.mean)
    return moments.second - mean if layer.bias is not None else moments.second


def error_in(metric: Tensor, difference: Tensor, whole: Tensor) -> float:
    """Mean of ``||D x||^2`` over that of ``||W x||^2``."""
    return float((difference @ metric * difference).sum() / (whole @ metric * whole).sum())


def whitened(W: Tensor, metric: Tensor, rank: int) -> Tensor:
    """The textbook way: Cholesky, singular value decomposition of ``W L``, truncation, and back."""
    L = torch.linalg.cholesky(metric)
    U, sigma, Vh = torch.linalg.svd(W @ L)
    kept = U[:, :rank] @ torch.diag(sigma[:rank]) @ Vh[:rank]
    return torch.linalg.solve_triangular(L, kept, upper=False, left=False)


def test_ranks_go_from_one_to_break_even_and_hold_what_two_factors_hold(case: Case):
    layer = case.build()
    m, n = matrix(layer).shape
    seen = trace(layer, {"layer": layer}, case.inputs())["layer"]
    options = Matrix().options(layer, None, seen)
    largest = max(r for r in range(1, min(m, n) + 1) if r * (m + n) < m * n)
    assert options.ranks == tuple((r,) for r in range(1, largest + 1))
    assert options.parameters.tolist() == [r * (m + n) for r in range(1, largest + 1)]
    assert options.multiplications.tolist() == [seen.rows * r * (m + n) for r in range(1, largest + 1)]
    assert options.errors.dtype == torch.float64 and bool((options.errors.diff() <= 0).all())


def test_without_moments_it_is_the_truncated_singular_value_decomposition(case: Case):
    layer = case.build()
    U, sigma, Vh = torch.linalg.svd(matrix(layer), full_matrices=False)
    options = offered(layer)
    for rank in some_ranks(options):
        best = U[:, :rank] @ torch.diag(sigma[:rank]) @ Vh[:rank]
        torch.testing.assert_close(matrix(Matrix().build(layer, None, (rank,))), best, **EXACT)
        tail = sigma[rank:].square().sum() / sigma.square().sum()
        torch.testing.assert_close(options.errors[rank - 1], tail, **EXACT)


def test_with_moments_it_is_what_whitening_gives(linear: Case):
    layer, x = linear.build(), linear.inputs()
    moments = moments_of(layer, x)
    metric, W = metric_of(layer, moments), matrix(layer)
    for rank in some_ranks(offered(layer)):
        new = Matrix().build(layer, moments, (rank,))
        torch.testing.assert_close(matrix(new), whitened(W, metric, rank), atol=1e-9, rtol=1e-7)


def test_no_matrix_of_the_same_rank_has_a_smaller_error(case: Case):
    layer, x = case.build(), case.inputs()
    moments = moments_of(layer, x)
    metric, W = metric_of(layer, moments), matrix(layer)
    for rank in some_ranks(offered(layer)):
        best = error_in(metric, W - matrix(Matrix().build(layer, moments, (rank,))), W)
        pair = torch.linalg.svd(W, full_matrices=False)
        rivals = [pair.U[:, :rank] @ torch.diag(pair.S[:rank]) @ pair.Vh[:rank]]
        for _ in range(5):  # projections on random outputs, and small changes of the answer
            Q = torch.linalg.qr(torch.randn(W.shape[0], rank, dtype=torch.float64)).Q
            rivals.append(Q @ (Q.mT @ W))
            found = Matrix().build(layer, moments, (rank,))
            A, B = found.A + 0.01 * torch.randn_like(found.A), found.B + 0.01 * torch.randn_like(found.B)
            rivals.append((A.mT @ B).detach())
        assert all(best <= error_in(metric, W - rival, W) * (1 + BEYOND) for rival in rivals)


def test_reported_errors_are_those_of_the_outputs(case: Case):
    layer, x = case.build(), case.inputs()
    moments = moments_of(layer, x)
    options = offered(layer, moments)
    y = rows_of(layer, layer(x))
    size = y - (y.mean(0) if layer.bias is not None else 0)
    for rank in some_ranks(options):
        new = Matrix().build(layer, moments, (rank,))
        change = rows_of(layer, new(x)) - y
        measured = change.square().sum() / size.square().sum()
        torch.testing.assert_close(options.errors[rank - 1], measured, **EXACT)


def test_the_bias_takes_the_mean_so_that_outputs_keep_theirs(case: Case):
    layer, x = case.build(), case.inputs()
    moments = moments_of(layer, x)
    new = Matrix().build(layer, moments, (1,))
    before, after = rows_of(layer, layer(x)).mean(0), rows_of(layer, new(x)).mean(0)
    if layer.bias is None:
        assert new.bias is None
    else:
        torch.testing.assert_close(after, before, **EXACT)


def test_without_moments_the_bias_is_the_very_same(case: Case):
    layer = case.build()
    new: Any = Matrix().build(layer, None, (1,))
    assert new.bias is layer.bias


def test_the_layer_that_is_looked_at_stays_as_it_was(case: Case):
    layer, x = case.build(), case.inputs()
    before = {name: (id(p), p.tolist()) for name, p in layer.named_parameters()}
    moments = moments_of(layer, x)
    kept = moments.second.clone(), moments.mean.clone()
    generator = torch.get_rng_state()
    offered(layer, moments)
    Matrix().build(layer, moments, (1,))
    assert {name: (id(p), p.tolist()) for name, p in layer.named_parameters()} == before
    assert torch.equal(moments.second, kept[0]) and torch.equal(moments.mean, kept[1])
    assert torch.equal(torch.get_rng_state(), generator)


def test_shaped_has_the_shapes_and_the_cost_of_what_is_built(case: Case):
    layer, x = case.build(), case.inputs()
    built, shaped = Matrix().build(layer, None, (2,)), Matrix().shaped(layer, (2,))
    assert shaped(x).shape == built(x).shape == layer(x).shape
    numbers = sum(p.numel() for p in shaped.parameters() if p.dim() > 1)
    assert numbers == offered(layer).parameters[1]


# --- data that do not say everything -----------------------------------------------------------------------------


@pytest.mark.parametrize("bias", [True, False])
def test_with_fewer_samples_than_features_the_outputs_on_them_are_exact(bias: bool):
    layer, x = nn.Linear(20, 16, bias, dtype=torch.float64), torch.randn(4, 20, dtype=torch.float64)
    moments = moments_of(layer, x)
    options = offered(layer, moments)
    assert float(options.errors[3]) < 1e-12 < float(options.errors[0])
    torch.testing.assert_close(Matrix().build(layer, moments, (4,))(x), layer(x), atol=1e-7, rtol=1e-7)


def test_features_that_are_always_zero_cost_nothing():
    layer = nn.Linear(12, 10, bias=False, dtype=torch.float64)
    x = torch.randn(50, 12, dtype=torch.float64)
    x[:, 3:] = 0
    moments = moments_of(layer, x)
    assert float(offered(layer, moments).errors[2]) < 1e-12
    torch.testing.assert_close(Matrix().build(layer, moments, (3,))(x), layer(x), atol=1e-9, rtol=1e-9)


@pytest.mark.parametrize("what", ["inputs", "weight"])
def test_nothing_to_approximate_is_no_error(what: str):
    layer = nn.Linear(9, 8, dtype=torch.float64)
    x = torch.randn(30, 9, dtype=torch.float64)
    with torch.no_grad():
        (x if what == "inputs" else layer.weight).zero_()
    moments = moments_of(layer, x)
    assert not offered(layer, moments).errors.any()
    new = Matrix().build(layer, moments, (2,))
    torch.testing.assert_close(new(x), layer(x), atol=1e-6, rtol=0)
    assert all(bool(p.isfinite().all()) for p in new.parameters())


def test_constant_inputs_are_left_to_the_bias():
    layer = nn.Linear(9, 8, dtype=torch.float64)
    x = torch.randn(1, 9, dtype=torch.float64).expand(5, 9)
    new = Matrix().build(layer, moments_of(layer, x), (1,))
    torch.testing.assert_close(new(x), layer(x), atol=1e-9, rtol=1e-9)


def test_a_weight_of_rank_one_is_kept_by_rank_one():
    layer = nn.Linear(9, 8, dtype=torch.float64)
    with torch.no_grad():
        layer.weight.copy_(torch.outer(torch.randn(8).double(), torch.randn(9).double()))
    x = torch.randn(30, 9, dtype=torch.float64)
    for moments in (None, moments_of(layer, x)):
        assert float(offered(layer, moments).errors[0]) < 1e-12
        torch.testing.assert_close(matrix(Matrix().build(layer, moments, (1,))), layer.weight.detach(), **EXACT)


def test_large_and_small_weights_have_the_same_errors():
    layer, x = nn.Linear(9, 8, dtype=torch.float64), torch.randn(30, 9, dtype=torch.float64)
    errors = []
    for scale in (1.0, 1e-18, 1e18):
        scaled = nn.Linear(9, 8, dtype=torch.float64)
        with torch.no_grad():
            scaled.weight.copy_(scale * layer.weight)
        errors.append(offered(scaled, moments_of(scaled, x)).errors)
    torch.testing.assert_close(errors[1], errors[0], **EXACT)
    torch.testing.assert_close(errors[2], errors[0], **EXACT)


# --- what the replacement takes over -----------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_narrow_weights_keep_their_type_and_lose_only_rounding(dtype: torch.dtype):
    layer = nn.Linear(12, 10).to(dtype)
    wide = nn.Linear(12, 10, dtype=torch.float64)
    wide.load_state_dict({name: p.double() for name, p in layer.state_dict().items()})
    x = torch.randn(40, 12, dtype=torch.float64)
    new, exact = (Matrix().build(one, moments_of(wide, x), (3,)) for one in (layer, wide))
    assert {p.dtype for p in new.parameters()} == {dtype}
    slack = 20 * torch.finfo(dtype).eps
    torch.testing.assert_close(matrix(new).double(), matrix(exact), atol=slack, rtol=slack)
    torch.testing.assert_close(offered(layer, moments_of(wide, x)).errors, offered(wide, moments_of(wide, x)).errors)


@pytest.mark.parametrize("weight", [True, False])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("training", [True, False])
def test_frozen_parameters_and_the_mode_are_kept(weight: bool, bias: bool, training: bool):
    layer, x = nn.Linear(9, 8, dtype=torch.float64), torch.randn(30, 9, dtype=torch.float64)
    layer.weight.requires_grad_(weight)
    layer.bias.requires_grad_(bias)
    layer.train(training)
    for moments in (None, moments_of(layer, x)):
        new: Any = Matrix().build(layer, moments, (2,))
        assert [p.requires_grad for p in (new.A, new.B, new.bias)] == [weight, weight, bias]
        assert new.training is training and all(p.is_leaf for p in new.parameters())


@pytest.mark.parametrize("form", ["pair", "core"])
@pytest.mark.parametrize("cls", [LowRankLinear, LowRankConv2d])
def test_a_low_rank_layer_offers_every_smaller_rank_of_its_own_weight(cls: Any, form: Any):
    sizes, shape = ((9, 8), (30, 9)) if cls is LowRankLinear else ((3, 8, 3), (4, 3, 6, 5))
    layer = cls(*sizes, rank=3, rank_multiple=4, dtype=torch.float64)
    m, n = layer.matrix_shape
    layer.set_factors(FactorPair(torch.randn(3, m, dtype=torch.float64), torch.randn(3, n, dtype=torch.float64)))
    layer.set_factors(layer.factors(), form=form)
    x = torch.randn(shape, dtype=torch.float64)
    moments = moments_of(layer, x)
    options = offered(layer, moments)
    assert options.ranks == ((1,), (2,))
    assert options.parameters.tolist() == [cost.factor_parameters(m, n, r) for r in (1, 2)]
    dense = layer.to_dense()
    torch.testing.assert_close(options.errors, offered(dense, moments).errors[:2], **EXACT)
    new = Matrix().build(layer, moments, (2,))
    assert type(new) is cls
    torch.testing.assert_close(new(x), Matrix().build(dense, moments, (2,))(x), **EXACT)


def test_a_layer_of_full_rank_above_break_even_can_still_become_smaller():
    layer = LowRankLinear(9, 8, rank=8, dtype=torch.float64)
    options = offered(layer)
    assert options.ranks == tuple((r,) for r in range(1, 8))


@pytest.mark.parametrize("module", [nn.Embedding(9, 8), nn.ReLU(), nn.ConvTranspose2d(3, 8, 3), nn.Bilinear(3, 3, 3)])
def test_other_modules_are_not_accepted(module: nn.Module):
    assert not Matrix().accepts(module)
