"""Laws of LowRankEmbedding beyond those of all low-rank layers: lookups, the padding row, refused options."""

from typing import Any

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from dynarank.factors import FactorPair
from dynarank.layers.embedding import LowRankEmbedding
from dynarank.layers.linear import LowRankLinear
from dynarank.optim.low_rank_optimizer import LowRankOptimizer


class Shapes(TorchDispatchMode):
    """Records the shapes of all tensors that are computed."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: set[tuple[int, ...]] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        self.seen |= {tuple(t.shape) for t in torch.utils._pytree.tree_leaves(out) if isinstance(t, torch.Tensor)}
        return out


@pytest.mark.parametrize("form", ["pair", "core"])
@pytest.mark.parametrize("rank", [1, 3, 11])  # 11 is above break-even: there a linear layer multiplies out
def test_the_table_is_never_built(form: Any, rank: int):
    layer = LowRankEmbedding(29, 13, 0, rank=rank)
    layer.set_factors(layer.factors(), form=form)
    with Shapes() as shapes:
        layer(torch.tensor([[3, 0, 28]])).square().sum().backward()
    assert (1, 3, 13) in shapes.seen and not {(29, 13), (13, 29)} & shapes.seen


def test_the_padding_row_is_zero_whatever_the_factors_hold():
    layer = LowRankEmbedding(6, 5, 2, rank=3, dtype=torch.float64)
    A, B = torch.randn(3, 6, dtype=torch.float64), torch.randn(3, 5, dtype=torch.float64)
    layer.set_factors(FactorPair(A, B))
    expected = A.mT @ B
    expected[2] = 0
    for form in ("pair", "core", "pair"):
        layer.set_factors(layer.point(), form=form)
        for table in (layer(torch.arange(6)), layer.weight, layer.to_dense().weight, layer.to_plain()(torch.arange(6))):
            table = table.detach().as_subclass(torch.Tensor)
            torch.testing.assert_close(table, expected, atol=1e-14, rtol=0)
            assert not table[2].any()


def test_lookups_of_the_padding_give_no_gradient():
    layer = LowRankEmbedding(6, 5, -4, rank=3)
    assert layer.padding_idx == 2
    layer(torch.tensor([2, 2])).sum().backward()
    assert not layer.A.grad.any() and not layer.B.grad.any()
    layer(torch.tensor([2, 4])).sum().backward()
    assert set(layer.A.grad.any(0).nonzero().flatten().tolist()) == {4} and layer.B.grad.any()


def train(model: nn.Module, optimizer: torch.optim.Optimizer, *, padding: int, steps: int = 30) -> None:
    generator = torch.Generator().manual_seed(1)
    for _ in range(steps):
        tokens = torch.randint(20, (16, 4), generator=generator)
        tokens[:, 0] = padding
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(tokens), tokens[:, 1] % 5).backward()
        optimizer.step()


def reader(padding: int) -> Any:
    torch.manual_seed(0)
    double = {"dtype": torch.float64}
    layer = LowRankEmbedding(20, 12, padding, rank=3, rank_multiple=4, **double)
    return nn.Sequential(layer, nn.Flatten(), nn.Linear(48, 5, **double))


@pytest.mark.parametrize("padding", [0, 7])
def test_plain_optimizers_leave_the_padding_and_the_spare_rows_at_zero(padding: int):
    model = reader(padding)
    before = model[0].A.detach().clone()
    train(model, torch.optim.AdamW(model.parameters(), lr=0.02, weight_decay=0.1), padding=padding)
    assert not model[0].A[3:].any() and not model[0].B[3:].any()
    assert model[0].A[:, padding].abs().max() < 1e-15  # rounding of the SVD it started from
    assert ((model[0].A - before).abs().amax(0) > 1e-3).sum() == 19


@pytest.mark.parametrize("padding", [0, 7])
@pytest.mark.parametrize("integrator", ["tangent_muon", "tangent_heavy_ball", "parallel_bug"])
def test_retractions_leave_the_padding_row_of_the_factors_at_zero_but_for_rounding(integrator: str, padding: int):
    model = reader(padding)
    before = model[0].weight.detach().clone()
    train(model, LowRankOptimizer(model, lr=0.02, integrator=integrator, rank_policy="fixed"), padding=padding)
    W = model[0].factors().to_dense()
    assert W[padding].abs().max() < 1e-13 * W.abs().max()
    assert not model[0](torch.tensor(padding)).any()
    assert (W - before).abs().max() > 1e-3


@pytest.mark.parametrize("integrator", ["gauge_fixed_muon", "tangent_muon", "augmented_bug"])
def test_growing_along_random_directions_keeps_the_padding_row_at_zero(integrator: str):
    model = reader(0)
    optimizer = LowRankOptimizer(model, lr=0.02, integrator=integrator, rank_policy="noise_edge", schedule="periodic")
    train(model, optimizer, padding=0)
    assert model[0].rank > 3
    assert not model[0](torch.tensor(0)).any() and not model[0].weight[0].any()


@pytest.mark.parametrize("integrator", ["tangent_muon", "parallel_bug", "augmented_bug"])
def test_it_learns_as_a_linear_layer_on_one_hot_vectors_learns(integrator: str):
    torch.manual_seed(0)
    looked_up: Any = nn.Sequential(LowRankEmbedding(11, 7, rank=3, dtype=torch.float64), nn.Tanh())
    multiplied: Any = nn.Sequential(LowRankLinear(11, 7, bias=False, rank=3, dtype=torch.float64), nn.Tanh())
    point = looked_up[0].point()
    multiplied[0].set_factors(FactorPair(point.B.clone(), point.A.clone()))  # the transposed weight
    tokens = torch.randint(11, (8, 16), generator=torch.Generator().manual_seed(1))
    target = torch.randn(16, 7, dtype=torch.float64)
    for model, inputs in ((looked_up, tokens), (multiplied, nn.functional.one_hot(tokens, 11).double())):
        # Muon's step has the factor sqrt(rows / columns), which a transpose turns around.
        rows, columns = model[0].matrix_shape
        lr = 0.1 * ((columns / rows) ** 0.5 if integrator == "tangent_muon" else 1)
        optimizer = LowRankOptimizer(model, lr=lr, integrator=integrator)
        for batch in inputs:
            optimizer.zero_grad()
            (model(batch) - target).square().mean().backward()
            optimizer.step()
    torch.testing.assert_close(looked_up[0].to_dense().weight, multiplied[0].to_dense().weight.mT, atol=1e-9, rtol=0)


# --- what is refused -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "why"),
    [
        ({"max_norm": 2.0}, r"max_norm=2.0: it rescales the rows that are looked up, in place"),
        ({"scale_grad_by_freq": True}, r"scale_grad_by_freq=True: gradients divided by counts"),
        ({"sparse": True}, r"sparse=True: every row that is looked up moves the whole factor B"),
    ],
)
def test_options_that_factors_cannot_follow_are_refused(options: Any, why: str):
    with pytest.raises(ValueError, match=f"cannot replace this nn.Embedding: {why}.* Keep it dense"):
        LowRankEmbedding.from_dense(nn.Embedding(9, 5, **options), rank=2)


def test_norm_type_means_nothing_without_a_norm():
    assert LowRankEmbedding.from_dense(nn.Embedding(9, 5, norm_type=1.0), rank=2).rank == 2


@pytest.mark.parametrize("index", [-10, 9])
def test_a_padding_index_out_of_range_is_refused(index: int):
    with pytest.raises(ValueError, match=f"padding_idx must be between -9 and 8, got {index}"):
        LowRankEmbedding(9, 5, index, rank=2)


def test_a_padding_row_that_is_not_zero_is_refused_wherever_a_dense_weight_comes_in():
    dense = nn.Embedding(9, 5, padding_idx=3)
    nn.init.ones_(dense.weight)
    layer = LowRankEmbedding(9, 5, 3, rank=2)
    kept = layer.A.detach().clone()
    for attempt in (
        lambda: LowRankEmbedding.from_dense(dense, rank=2),
        lambda: layer.set_weight_(dense.weight),
        lambda: layer.load_state_dict(dense.state_dict()),
    ):
        with pytest.raises(ValueError, match=r"padding_idx = 3 must be zero: .* Zero it, or keep"):
            attempt()
    assert torch.equal(layer.A, kept)


@pytest.mark.parametrize("x", [torch.tensor([9]), torch.tensor([-1])])
def test_indices_out_of_range_are_errors(x: torch.Tensor):
    with pytest.raises(IndexError):
        LowRankEmbedding(9, 5, rank=2)(x)
