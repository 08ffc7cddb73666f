"""The Tucker twin of a convolution against the dense convolution with the same weight."""

import copy
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dynarank import linalg, tucker
from dynarank.layers.conv2d_tucker import LowRankTuckerConv2d
from dynarank.tucker import TuckerFactors


@dataclass(frozen=True)
class Case:
    """A layer and an input for it."""

    sizes: tuple[Any, ...]
    shape: tuple[int, ...]
    options: dict[str, Any] = field(default_factory=dict)
    ranks: tuple[int, ...] = (3, 2)

    def build(self, **more: Any) -> LowRankTuckerConv2d:
        """Return a float64 layer with random factors in no particular gauge."""
        options: dict[str, Any] = {"ranks": self.ranks, "dtype": torch.float64} | self.options | more
        layer = LowRankTuckerConv2d(*self.sizes, **options)
        layer.set_factors(random_factors(layer, layer.ranks))
        return layer

    def inputs(self) -> Tensor:
        return torch.randn(self.shape, dtype=torch.float64)


def random_factors(layer: LowRankTuckerConv2d, ranks: tucker.Ranks) -> TuckerFactors:
    sizes = list(zip(layer.weight_shape, ranks, strict=True))
    bases = tuple(None if r is None else torch.randn(n, r, dtype=torch.float64) for n, r in sizes)
    return TuckerFactors(torch.randn([n if r is None else r for n, r in sizes], dtype=torch.float64), bases)


CASES = {
    "plain": Case((5, 8, 3), (2, 5, 7, 8)),
    "no-bias": Case((5, 8, (3, 2)), (2, 5, 7, 8), {"bias": False, "padding": "valid"}),
    "stride": Case((5, 9, (3, 5)), (2, 5, 9, 11), {"stride": (2, 1), "padding": (1, 3), "dilation": (1, 2)}),
    "same": Case((5, 8, (3, 2)), (2, 5, 7, 8), {"padding": "same", "dilation": (1, 2)}),
    "reflect": Case((5, 8, 3), (2, 5, 7, 8), {"padding": (1, 2), "padding_mode": "reflect", "stride": (1, 2)}),
    "replicate": Case((5, 8, 3), (2, 5, 7, 8), {"padding": 1, "padding_mode": "replicate"}),
    "circular": Case((5, 8, 3), (2, 5, 7, 8), {"padding": "same", "padding_mode": "circular"}),
    "1x1": Case((5, 7, 1), (2, 5, 3, 3), ranks=(2, 2)),
    "rank-one": Case((5, 8, 3), (2, 5, 7, 8), ranks=(1, 1)),
    "full": Case((5, 8, 3), (2, 5, 7, 8), ranks=(8, 5)),
    "four-modes": Case((5, 8, (3, 4)), (2, 5, 7, 8), {"padding": 1, "stride": 2}, ranks=(3, 2, 2, 3)),
    "four-modes-full": Case((4, 3, 3), (2, 4, 7, 8), ranks=(3, 4, 3, 3)),
    "unbatched": Case((5, 8, 3), (5, 7, 8), {"padding": 1}),
    "no-samples": Case((5, 8, 3), (0, 5, 7, 8)),
}


@pytest.fixture(params=CASES.values(), ids=CASES.keys())
def case(request: pytest.FixtureRequest) -> Case:
    return request.param


def dense_output(layer: LowRankTuckerConv2d, x: Tensor) -> Tensor:
    """Return what ``nn.Conv2d`` computes with the weight of the factors multiplied out here."""
    point = layer.tucker_point()
    W = point.core
    for mode, U in enumerate(point.bases):
        W = W if U is None else torch.tensordot(U, W, dims=([1], [mode])).movedim(0, mode)
    dense: Any = layer.dense_twin()
    with torch.no_grad():
        dense.weight.copy_(W)
    dense.bias = layer.bias
    return dense(x)


def test_the_output_is_that_of_the_dense_convolution(case: Case):
    layer, x = case.build(), case.inputs()
    torch.testing.assert_close(layer(x), dense_output(layer, x), atol=1e-10, rtol=1e-10)
    torch.testing.assert_close(layer(x), layer.to_dense()(x), atol=1e-10, rtol=1e-10)


def test_three_plain_convolutions_compute_the_same(case: Case):
    layer, x = case.build().eval(), case.inputs()
    plain = layer.to_plain()
    assert [type(part) for part in plain] == [nn.Conv2d] * 3
    assert not plain.training
    shapes = [tuple(part.weight.shape) for part in plain]  # type: ignore[union-attr]
    r_out, r_in = case.ranks[:2]
    between = (r_out, r_in, *layer.kernel_size)
    assert shapes == [(r_in, layer.in_channels, 1, 1), between, (layer.out_channels, r_out, 1, 1)]
    torch.testing.assert_close(plain(x), layer(x), atol=1e-10, rtol=1e-10)


def test_channels_last_computes_the_same():
    layer, x = CASES["plain"].build(), CASES["plain"].inputs()
    torch.testing.assert_close(layer(x.to(memory_format=torch.channels_last)), layer(x), atol=1e-10, rtol=0)


@pytest.mark.parametrize("name", ["plain", "stride", "circular", "full", "four-modes"])
def test_every_gradient_is_the_true_one(name: str):
    layer, x = CASES[name].build(), CASES[name].inputs().requires_grad_()
    parameters = dict(layer.named_parameters())

    def output(x: Tensor, *values: Tensor) -> Tensor:
        return torch.func.functional_call(layer, dict(zip(parameters, values, strict=True)), (x,))

    assert torch.autograd.gradcheck(output, (x, *parameters.values()), fast_mode=True)


def test_the_gradient_on_the_manifold_is_the_projected_dense_gradient(case: Case):
    layer, x = case.build(), case.inputs()
    weight = layer.to_dense().weight.detach().requires_grad_()
    dense: Any = layer.to_dense()
    y = torch.func.functional_call(dense, {"weight": weight}, (x,))
    probe = torch.randn_like(y)
    (G,) = torch.autograd.grad((y * probe).sum(), weight)
    (layer(x) * probe).sum().backward()
    at, gradient = layer.factors(), layer.tucker_gradient()
    assert gradient is not None
    found = tucker.project_gradient(at, tucker.turn_gradient(gradient, layer.tucker_point(), at))
    inward = [None if U is None else U.mT for U in at.bases]
    size = 1e-9 * max(1.0, float(G.norm()))
    torch.testing.assert_close(found.core, tucker.multiply(G, inward), atol=size, rtol=0)
    for mode, U in at.modes():
        Q, _ = tucker.row_frame(at.core, mode)
        K = tucker.unfold(tucker.multiply(G, inward, skip=mode), mode) @ Q
        torch.testing.assert_close(found.slopes[mode], K - U @ (U.mT @ K), atol=size, rtol=0)


# --- the weight --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("ranks", [(8, 5), (8, 5, 3, 2)])
def test_full_ranks_of_a_dense_layer_lose_nothing(ranks: tuple[int, ...]):
    dense = nn.Conv2d(5, 8, (3, 2), padding=1, padding_mode="reflect", dtype=torch.float64).eval()
    layer = LowRankTuckerConv2d.from_dense(dense, ranks=ranks)
    assert layer.bias is dense.bias
    assert not layer.training
    torch.testing.assert_close(layer.weight, dense.weight.detach(), atol=1e-12, rtol=0)
    torch.testing.assert_close(layer.to_dense().weight, dense.weight, atol=1e-12, rtol=0)


def test_a_dense_layer_on_the_meta_device_gives_one_there():
    layer = LowRankTuckerConv2d.from_dense(nn.Conv2d(5, 8, 3, device="meta"), ranks=(3, 2))
    assert all(p.is_meta for p in layer.parameters())


def test_a_fresh_layer_is_drawn_as_torch_draws_it():
    torch.manual_seed(3)
    layer = LowRankTuckerConv2d(5, 8, 3, ranks=(8, 5))
    torch.manual_seed(3)
    dense = nn.Conv2d(5, 8, 3)
    torch.testing.assert_close(layer.weight, dense.weight.detach(), atol=1e-6, rtol=0)
    torch.testing.assert_close(layer.bias, dense.bias)


def test_the_weight_is_read_only_and_differentiable():
    layer = CASES["plain"].build()
    layer.weight.sum().backward()
    assert layer.core.grad is not None
    with pytest.raises(RuntimeError, match="read-only"):
        nn.init.zeros_(layer.weight)
    with pytest.raises(AttributeError, match="set_weight_"):
        layer.weight = nn.Parameter(torch.zeros(8, 5, 3, 3))


def test_factors_are_set_within_the_capacity_in_place():
    layer = CASES["plain"].build(ranks=(5, 3), rank_multiple=4)
    assert tuple(layer.core.shape) == (8, 4, 3, 3)
    held = [(id(p), p.data_ptr()) for p in layer.parameters()]
    point = random_factors(layer, (6, 2, None, None))
    layer.set_factors(point)
    assert held == [(id(p), p.data_ptr()) for p in layer.parameters()]
    assert layer.ranks == (6, 2, None, None)
    torch.testing.assert_close(layer.weight, point.to_dense(), atol=1e-10, rtol=0)
    layer.set_factors(random_factors(layer, (2, 2, None, None)), resize=False)
    assert tuple(layer.core.shape) == (8, 4, 3, 3)


def test_beyond_the_capacity_parameters_change_their_shape_and_keep_their_identity():
    layer = CASES["plain"].build()
    held = [id(p) for p in layer.parameters()]
    layer(CASES["plain"].inputs()).sum().backward()
    point = random_factors(layer, (5, 4, None, None))
    layer.set_factors(point)
    assert held == [id(p) for p in layer.parameters()]
    assert tuple(layer.core.shape) == (5, 4, 3, 3)
    torch.testing.assert_close(layer.weight, point.to_dense(), atol=1e-10, rtol=0)


def test_a_live_graph_refuses_new_shapes_and_nothing_changes():
    layer = CASES["plain"].build()
    kept = layer(CASES["plain"].inputs())
    before = layer.to_dense().weight.clone()
    assert layer.resize_refusal() is not None
    with pytest.raises(RuntimeError, match="cannot become"):
        layer.set_factors(random_factors(layer, (5, 4, None, None)))
    assert layer.ranks == (3, 2, None, None)
    torch.testing.assert_close(layer.to_dense().weight, before, atol=0, rtol=0)
    kept.sum().backward()


def test_setting_the_layers_own_factors_in_another_order_is_safe():
    layer = CASES["plain"].build()
    before, point = layer.to_dense().weight.clone(), layer.tucker_point()
    turned = tuple(None if U is None else U.flip(1) for U in point.bases)
    layer.set_factors(TuckerFactors(point.core.flip(0).flip(1), turned))
    torch.testing.assert_close(layer.to_dense().weight, before, atol=1e-12, rtol=0)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"ranks": (3, 6)}, "rank of mode 1 must be between 1 and 5"),
        ({"ranks": (8, 1, 2, 2)}, "rank of mode 0 must be between 1 and 4"),
        ({"ranks": (3,)}, "ranks must be"),
        ({"ranks": (3, 2), "groups": 5}, "needs groups = 1"),
        ({"ranks": (3, 2), "rank_multiple": 0}, "rank_multiple"),
        ({"ranks": (3, 2), "padding_mode": "mirror"}, "padding_mode"),
    ],
)
def test_bad_options_are_named(options: dict[str, Any], message: str):
    with pytest.raises(ValueError, match=message):
        LowRankTuckerConv2d(5, 8, 3, **options)


def test_factors_of_another_weight_are_refused():
    layer, other = CASES["plain"].build(), CASES["four-modes"].build()
    with pytest.raises(ValueError, match="factors must be of a weight of shape"):
        layer.set_factors(other.tucker_point())


# --- training ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("optimizer", [torch.optim.SGD, torch.optim.AdamW, torch.optim.Adagrad])
def test_plain_optimizers_train_plain_factors_and_leave_spare_slices_zero(optimizer: type[torch.optim.Optimizer]):
    torch.manual_seed(0)
    layer = LowRankTuckerConv2d(5, 8, 3, ranks=(3, 2), rank_multiple=4)
    x = torch.randn(16, 5, 6, 6)
    target = F.conv2d(x, torch.randn(8, 5, 3, 3))
    run = optimizer(layer.parameters(), lr=0.02)
    losses = []
    for _ in range(20):
        loss = (layer(x) - target).square().mean()
        run.zero_grad()
        loss.backward()
        run.step()
        losses.append(loss.item())
    assert losses[-1] < 0.97 * losses[0]
    assert not layer.core[3:].any()
    assert not layer.core[:, 2:].any()
    assert not layer.out_basis[3:].any()
    assert not layer.in_basis[2:].any()


def test_a_layer_that_is_written_is_in_the_gauge():
    layer = LowRankTuckerConv2d(5, 8, 3, ranks=(3, 2))
    layer.set_factors(layer.factors())
    point = layer.tucker_point()
    for mode, U in point.modes():
        torch.testing.assert_close(U.mT @ U, torch.eye(U.shape[1]), atol=1e-6, rtol=0)
        expected = torch.linalg.svdvals(tucker.unfold(layer.to_dense().weight.detach(), mode))[: U.shape[1]]
        torch.testing.assert_close(linalg.row_norms(tucker.unfold(point.core, mode)), expected, atol=1e-5, rtol=1e-5)


# --- state dict --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("ranks", [(3, 2), (5, 4)])
@pytest.mark.parametrize("multiple", [1, 4])
def test_a_state_dict_is_loaded_into_a_layer_of_other_ranks(ranks: tuple[int, int], multiple: int):
    saved = CASES["plain"].build(ranks=(4, 3), rank_multiple=multiple)
    layer = CASES["plain"].build(ranks=ranks)
    layer.load_state_dict(saved.state_dict())
    x = CASES["plain"].inputs()
    assert layer.ranks == saved.ranks == (4, 3, None, None)
    torch.testing.assert_close(layer(x), saved(x), atol=0, rtol=0)


def test_a_dense_state_dict_becomes_its_truncated_hosvd():
    dense = nn.Conv2d(5, 8, 3, dtype=torch.float64)
    layer = CASES["plain"].build(rank_multiple=4)
    layer.load_state_dict(dense.state_dict())
    expected = tucker.from_dense(dense.weight.detach(), ranks=(3, 2, None, None)).to_dense()
    torch.testing.assert_close(layer.weight, expected, atol=1e-10, rtol=0)
    torch.testing.assert_close(layer.bias, dense.bias)


def test_a_state_dict_of_another_convolution_is_refused():
    with pytest.raises(RuntimeError, match="size mismatch"):
        CASES["plain"].build().load_state_dict(CASES["stride"].build().state_dict())


def test_copies_are_independent():
    layer = CASES["four-modes"].build()
    twin = copy.deepcopy(layer)
    twin.set_weight_(torch.zeros(layer.weight_shape, dtype=torch.float64))
    assert layer.to_dense().weight.norm().item() > 1
    assert twin.ranks == layer.ranks


def test_it_prints_its_ranks():
    assert repr(CASES["plain"].build()).endswith("5, 8, kernel_size=(3, 3), stride=(1, 1), ranks=(3, 2))")
