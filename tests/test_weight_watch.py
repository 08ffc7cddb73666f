"""The watcher sees weights as matrices, whatever layers hold them, and goes on after a checkpoint."""

import copy
from dataclasses import asdict
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from dynarank import LowRankOptimizer, checkpoint, factorize_, linalg
from dynarank.factors import FactorPair, diagonalise, from_dense
from dynarank.history import History
from dynarank.layers.base import low_rank_layers
from dynarank.layers.conv2d import LowRankConv2d
from dynarank.layers.conv2d_spatial import LowRankSpatialConv2d
from dynarank.layers.conv2d_tucker import LowRankTuckerConv2d
from dynarank.layers.embedding import LowRankEmbedding
from dynarank.layers.linear import LowRankLinear
from dynarank.stability import WeightWatch

COMPARED = ("stability", "overlap", "change")


def network(dtype: torch.dtype = torch.float64) -> nn.Sequential:
    layers = [nn.Conv2d(2, 9, 3), nn.BatchNorm2d(9), nn.Flatten(), nn.Linear(9 * 16, 20), nn.ReLU(), nn.Linear(20, 3)]
    return nn.Sequential(*layers).to(dtype)


def take_steps(model: nn.Module, optimizer: torch.optim.Optimizer, *, first: int, last: int) -> None:
    for step in range(first, last + 1):
        inputs = torch.randn(8, 2, 6, 6, generator=torch.Generator().manual_seed(step), dtype=torch.float64)
        optimizer.zero_grad()
        model(inputs).square().mean().backward()
        optimizer.step()


def stability_of(one: Tensor, other: Tensor) -> float:
    """``tr(E^T F) / min(m, n)`` by dense polar factors."""
    return float((linalg.polar(one.flatten(1)) * linalg.polar(other.flatten(1))).sum()) / min(one.flatten(1).shape)


def test_a_look_at_a_dense_model_compares_with_the_look_before():
    model = network()
    history = History()
    watch = WeightWatch(model, history)
    first = watch.look(0, lr=0.1)
    assert list(first) == ["0", "3", "5"]
    assert all(getattr(found, name) is None for found in first.values() for name in COMPARED)
    before = {name: layer.weight.detach().clone() for name, layer in model.named_children() if name in first}
    take_steps(model, torch.optim.SGD(model.parameters(), lr=0.5), first=1, last=3)
    found = watch.look(3, lr=0.05)
    for name, W in before.items():
        now = model.get_parameter(f"{name}.weight").detach()
        assert found[name].stability == pytest.approx(stability_of(W, now), abs=1e-12)
        assert found[name].change == pytest.approx(float((now - W).norm() / W.norm()), rel=1e-10)
        assert found[name].shape == (len(W), W[0].numel())
    assert [(look["step"], look["lr"]) for look in history.looks] == [(0, 0.1), (3, 0.05)]
    assert history.looks[1]["layers"]["3"] == {
        name: list(value) if isinstance(value, tuple) else value for name, value in asdict(found["3"]).items()
    }


def test_nothing_about_the_model_changes():
    model = network()
    weights, generator = copy.deepcopy(model.state_dict()), torch.get_rng_state()
    versions = [p._version for p in model.parameters()]
    WeightWatch(model).look(0)
    assert all(torch.equal(value, weights[name]) for name, value in model.state_dict().items())
    assert [p._version for p in model.parameters()] == versions
    assert torch.equal(generator, torch.get_rng_state())


def low_rank_twins() -> list[nn.Module]:
    kind = {"dtype": torch.float64}
    linear = LowRankLinear(9, 7, rank=3, rank_multiple=4, **kind)
    core = LowRankLinear(7, 9, rank=3, **kind)
    core.set_factors(diagonalise(core.factors()))
    assert core.form == "core"
    return [
        linear,
        core,
        LowRankEmbedding(11, 6, rank=2, **kind),
        LowRankConv2d(2, 7, 3, rank=3, **kind),
        LowRankTuckerConv2d(4, 7, 3, ranks=(3, 2), **kind),
        LowRankSpatialConv2d(2, 7, 3, rank=3, **kind),
    ]


@pytest.mark.parametrize("layer", low_rank_twins(), ids=lambda layer: f"{type(layer).__name__} {layer.form}")
def test_a_low_rank_layer_is_seen_as_its_weight_is(layer: nn.Module):
    dense = layer.to_dense()
    seen, known = (WeightWatch(model).look(0)["0"] for model in (nn.Sequential(layer), nn.Sequential(as_linear(dense))))
    assert (seen.shape, seen.rank) == (known.shape, known.rank)
    for name in ("stable_rank", "effective_rank", "retained_energy"):
        assert getattr(seen, name) == pytest.approx(getattr(known, name), rel=1e-9)
    assert seen.singular_values == pytest.approx(known.singular_values, rel=1e-5)


def as_linear(dense: nn.Module) -> nn.Module:
    """Return a plain layer with the weight of another one as a matrix."""
    W = dense.get_parameter("weight").detach().flatten(1)
    linear = nn.Linear(W.shape[1], W.shape[0], dtype=W.dtype)
    linear.weight = nn.Parameter(W)
    return linear


def test_a_layer_that_goes_low_rank_is_compared_as_the_matrix_that_it_is():
    model = network()
    watch = WeightWatch(model)
    watch.look(0)
    before = model[3].weight.detach().clone()
    factorize_(model, rank=4)
    found = watch.look(1)["3"]
    assert isinstance(model[3], LowRankLinear) and found.rank == 4
    kept = from_dense(before, rank=4).to_dense()
    assert found.stability == pytest.approx(1, abs=1e-9)  # the SVD keeps the leading directions as they are
    assert found.overlap == pytest.approx(1, abs=1e-9)
    assert found.change == pytest.approx(float((kept - before).norm() / before.norm()), rel=1e-9)


def test_ranks_may_change_between_looks():
    model = nn.Sequential(LowRankLinear(30, 20, rank=6, dtype=torch.float64))
    watch = WeightWatch(model, top=4)
    watch.look(0)
    (layer,) = low_rank_layers(model).values()
    cut = from_dense(layer.weight.as_subclass(Tensor).detach(), rank=2)
    layer.set_factors(cut, form="pair")
    found = watch.look(1)["0"]
    assert found.rank == 2 and found.stability == pytest.approx(1, abs=1e-9)
    layer.set_factors(FactorPair(torch.randn(9, 20).double(), torch.randn(9, 30).double()))
    assert watch.look(2)["0"].rank == 9


def test_new_directions_at_the_floor_are_none_yet():
    model = nn.Sequential(LowRankLinear(30, 20, rank=3))
    optimizer = LowRankOptimizer(model, lr=0.01, rank_policy="relative_tail")
    model(torch.randn(4, 30)).square().sum().backward()
    optimizer.change_ranks()
    assert model[0].rank > 3 and WeightWatch(model).look(0)["0"].rank <= 3


def test_a_weight_of_half_precision_that_is_low_rank_has_its_rank():
    model = nn.Sequential(LowRankLinear(64, 48, rank=5)).bfloat16()
    assert WeightWatch(model).look(0)["0"].rank == 5


def test_a_layer_of_zeros_is_watched_until_it_wakes():
    model = network()
    nn.init.zeros_(model[5].weight)
    watch = WeightWatch(model)
    found = watch.look(0)["5"]
    assert (found.rank, found.stable_rank, found.retained_energy, found.singular_values) == (0, 0.0, 1.0, ())
    assert watch.look(1)["5"].stability == 1
    with torch.no_grad():
        model[5].weight.normal_()
    assert watch.look(2)["5"].stability == 0 and watch.look(3)["5"].stability == pytest.approx(1)


def test_a_layer_of_another_shape_starts_anew():
    model = nn.Sequential(nn.Linear(6, 5), nn.Linear(5, 3))
    watch = WeightWatch(model)
    watch.look(0)
    model[0], model[1] = nn.Linear(6, 4), nn.Linear(4, 3)
    assert all(found.stability is None for found in watch.look(1).values())
    assert all(found.stability == pytest.approx(1, abs=1e-5) for found in watch.look(2).values())


def test_a_model_may_change_its_dtype():
    model = network(torch.float32)
    watch = WeightWatch(model)
    watch.look(0)
    model.double()
    assert watch.look(1)["3"].stability == pytest.approx(1, abs=1e-5)


def test_a_lazy_layer_is_watched_once_its_shape_is_known():
    model = nn.Sequential(nn.LazyLinear(4), nn.Linear(4, 3))
    watch = WeightWatch(model)
    assert list(watch.look(0)) == ["1"]
    model(torch.randn(2, 5))
    assert list(watch.look(1)) == ["0", "1"]


def test_looks_go_on_after_a_checkpoint_as_if_nothing_had_happened(tmp_path: Path):
    def run(path: Path, *, stop: int | None = None) -> Path:
        """Train for 12 steps with a look at every third one, a checkpoint after step 7, and a stop."""
        torch.manual_seed(0)
        model = network()
        optimizer = torch.optim.SGD(model.parameters(), lr=0.5, momentum=0.9)
        history = History(path / "history.jsonl")
        watch = WeightWatch(model, history)
        watch.look(0)
        go_on(model, optimizer, watch, path, first=1, stop=stop)
        return path / "history.jsonl"

    def go_on(model, optimizer, watch, path: Path, *, first: int, stop: int | None = None) -> None:
        for step in range(first, (stop or 12) + 1):
            take_steps(model, optimizer, first=step, last=step)
            if step % 3 == 0:
                watch.look(step, lr=0.5)
            if step == 7:
                checkpoint.save(path / "checkpoint", step=7, model=model, optimizer=optimizer, watch=watch)

    whole, part = run(tmp_path / "whole"), run(tmp_path / "part", stop=10)
    model = network()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5, momentum=0.9)
    history = History(part, resume_at=7)
    watch = WeightWatch(model, history)
    checkpoint.load(tmp_path / "part" / "checkpoint", model=model, optimizer=optimizer, watch=watch)
    go_on(model, optimizer, watch, tmp_path / "part", first=8)
    assert part.read_bytes() == whole.read_bytes()
    assert [look["step"] for look in History.read(part).looks] == [0, 3, 6, 9, 12]


def test_a_weight_that_is_not_finite_is_named_and_nothing_is_recorded():
    model = network()
    history = History()
    watch = WeightWatch(model, history)
    with torch.no_grad():
        model[3].weight[2, 1] = torch.nan
    with pytest.raises(ValueError, match="the weight of 3 cannot be looked at after step 7: svd needs finite entries"):
        watch.look(7)
    assert history.records == []


def test_a_model_without_weights_to_watch_is_refused():
    with pytest.raises(ValueError, match=r"ReLU holds no layer to watch. Watched are nn.Linear"):
        WeightWatch(nn.ReLU())
    with pytest.raises(ValueError, match="top must be at least 1, got 0"):
        WeightWatch(network(), top=0)
