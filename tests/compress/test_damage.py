"""What errors of one layer do to the outputs: measured without a trace, never falling, and used."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from dynarank.compress import Compressor, compress_, kl_divergence, relative_error
from dynarank.compress._survey import probes_of
from dynarank.compress.forms.matrix import Matrix
from dynarank.compress.sensitivity import PROBES, Damage, measure_damage, unmeasured
from dynarank.measure import call, evaluating, input_moments

MATRIX = {"forms": ["matrix"]}


class Branches(nn.Module):
    """Two equal branches, of which one is multiplied by a number on its way to the head."""

    def __init__(self, factor: float) -> None:
        super().__init__()
        kind: dict[str, Any] = {"dtype": torch.float64}
        self.heard, self.unheard = nn.Linear(20, 20, **kind), nn.Linear(20, 20, **kind)
        self.head = nn.Linear(20, 4, **kind)
        self.factor = factor

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.heard(x).tanh() + self.factor * self.unheard(x).tanh())


@pytest.fixture
def x() -> Tensor:
    return torch.randn(60, 20, dtype=torch.float64)


def damage_of(model: nn.Module, name: str, batches: list[Tensor], divergence: Any = relative_error) -> Damage:
    layer = model.get_submodule(name)
    moments = input_moments(model, {name: layer}, batches)[name]
    menu = [(Matrix(), Matrix().options(layer, moments, None))]
    with evaluating(model):
        probes = probes_of(model, batches, call)
        return measure_damage(model, layer, menu, moments, probes, forward=call, divergence=divergence)


def test_the_measured_points_are_those_of_swapping_by_hand(x: Tensor):
    model = Branches(0.5)
    found = damage_of(model, "heard", [x])
    moments = input_moments(model, {"heard": model.heard}, [x])["heard"]
    options = Matrix().options(model.heard, moments, None)
    wanted, layer = model(x).detach(), model.heard
    assert len(found.errors) == len({int((options.errors / p).log().abs().argmin()) for p in PROBES}) + 2
    for error, divergence in zip(found.errors[1:-1].tolist(), found.divergences[1:-1].tolist(), strict=True):
        rank = 1 + int((options.errors - error).abs().argmin())
        assert float(options.errors[rank - 1]) == error
        model.heard = Matrix().build(layer, moments, (rank,))  # type: ignore[assignment]
        by_hand = float((model(x).detach() - wanted).square().sum() / wanted.square().sum())
        assert divergence == pytest.approx(by_hand, rel=1e-9)
    model.heard = layer


@pytest.mark.parametrize("divergence", [relative_error, kl_divergence])
def test_the_curve_starts_at_nothing_and_never_falls(x: Tensor, divergence: Any):
    for name in ("heard", "unheard"):
        found = damage_of(Branches(0.3), name, [x, x + 1], divergence)
        assert (float(found.errors[0]), float(found.divergences[0])) == (0, 0)
        assert float(found.errors[-1]) == 1 and bool((found.errors.diff() > 0).all())
        assert bool((found.divergences.diff() >= 0).all()) and float(found.divergences[-1]) > 0
        at = found.of(torch.linspace(0, 1, 101, dtype=torch.float64))
        assert float(at[0]) == 0 and bool((at.diff() >= 0).all()) and bool(at.isfinite().all())


def test_a_divergence_that_falls_is_levelled(x: Tensor):
    told = iter([3.0, 1.0, 2.0, 0.5])
    found = damage_of(Branches(1.0), "heard", [x], lambda before, now: torch.tensor(next(told)))
    assert bool((found.divergences.diff() >= 0).all())


def test_the_mean_over_the_first_two_batches_counts(x: Tensor):
    seen: list[int] = []
    model = Branches(1.0)

    def forward(model: nn.Module, batch: Tensor) -> Tensor:
        seen.append(len(batch))
        return model(batch)

    Compressor(model, calibration=[x[:7], x[:8], x[:9]], forward=forward, method="svd", **MATRIX)
    assert seen.count(7) > 4 and seen.count(8) > 4 and seen.count(9) == 0
    one, two = damage_of(model, "heard", [x, x + 3]), damage_of(model, "heard", [x + 3, x])
    torch.testing.assert_close(one.divergences, two.divergences, atol=1e-12, rtol=1e-9)


@pytest.mark.parametrize("training", [True, False])
def test_the_model_is_left_as_it_was(state_of: Any, x: Tensor, training: bool):
    model = nn.Sequential(Branches(0.5), nn.BatchNorm1d(4, dtype=torch.float64), nn.Dropout(0.5)).train(training)
    model[0].heard.register_forward_hook(lambda *_: None)
    before = state_of(model)
    Compressor(model, calibration=[x])
    assert state_of(model) == before


def test_the_layer_is_put_back_when_the_model_fails(state_of: Any, x: Tensor):
    model = Branches(0.5)
    before = state_of(model)

    def divergence(before: Any, now: Any) -> Tensor:
        raise KeyError("mine")

    with pytest.raises(KeyError, match="mine"):
        Compressor(model, calibration=[x], divergence=divergence)
    assert state_of(model) == before


def test_a_shared_layer_is_swapped_wherever_it_is(x: Tensor):
    layer, head = nn.Linear(20, 20, dtype=torch.float64), nn.Linear(20, 3, dtype=torch.float64)
    model = nn.Sequential(layer, nn.ReLU(), layer, nn.ReLU(), head)
    found = damage_of(model, "0", [x])
    moments = input_moments(model, {"0": layer}, [x])["0"]
    errors = Matrix().options(layer, moments, None).errors
    rank = 1 + int((errors - found.errors[-2]).abs().argmin())  # the one of the largest error that was tried
    new = Matrix().build(layer, moments, (rank,))
    wanted = model(x).detach()
    swapped = nn.Sequential(new, nn.ReLU(), new, nn.ReLU(), head)
    by_hand = float((swapped(x).detach() - wanted).square().sum() / wanted.square().sum())
    assert float(found.divergences[-2]) == pytest.approx(by_hand, rel=1e-9)


# --- what it is used for -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", ["activation_aware", "svd"])
def test_a_layer_that_nobody_hears_has_no_damage_and_is_cut_first(x: Tensor, method: str):
    report = compress_(Branches(0.0), 0.6, calibration=[x], method=method, **MATRIX)
    heard, unheard = report.layers[:2]
    assert unheard.rank == (1,) and unheard.damage == 0 < unheard.error
    assert not heard.rank or heard.rank > (5,)


def test_of_two_equal_layers_the_one_that_is_heard_less_is_cut_more(x: Tensor):
    model = Branches(0.1)
    model.unheard.load_state_dict(model.heard.state_dict())
    report = compress_(model, 0.55, calibration=[x], **MATRIX)
    heard, unheard = report.layers[:2]
    assert unheard.rank < (heard.rank or (20,))
    plain = Branches(0.1)
    plain.unheard.load_state_dict(plain.heard.state_dict())
    report = compress_(plain, 0.55, calibration=[x], measured_sensitivity=False, **MATRIX)
    assert abs(report.layers[0].rank[0] - report.layers[1].rank[0]) <= 1
    assert all(layer.damage == pytest.approx(layer.error) for layer in report.compressed)


def test_unmeasured_damage_is_the_error_itself():
    errors = torch.tensor([0.0, 1e-9, 0.3, 1.0], dtype=torch.float64)
    assert torch.equal(unmeasured().of(errors), errors)


def test_damage_between_two_points_lies_on_the_line():
    damage = Damage(torch.tensor([0.0, 0.2, 1.0]).double(), torch.tensor([0.0, 0.1, 0.9]).double())
    found = damage.of(torch.tensor([0.1, 0.2, 0.6, 1.0, 2.0]).double())
    torch.testing.assert_close(found, torch.tensor([0.05, 0.1, 0.5, 0.9, 0.9]).double())


# --- divergences -------------------------------------------------------------------------------------------------


def test_relative_error_is_that_of_all_outputs_together():
    before = {"a": torch.randn(3, 4), "b": [torch.randn(2), torch.arange(3)], "c": None}
    now = {"a": torch.randn(3, 4), "b": [torch.randn(2), torch.arange(3) + 1], "c": None}
    flat = [torch.cat([one["a"].flatten(), one["b"][0]]) for one in (before, now)]  # type: ignore[index, union-attr]
    expected = (flat[1] - flat[0]).square().sum() / flat[0].square().sum()
    torch.testing.assert_close(relative_error(before, now), expected)
    assert float(relative_error(before, before)) == 0
    torch.testing.assert_close(relative_error(torch.zeros(3), torch.zeros(3)), torch.tensor(0.0))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_narrow_outputs_do_not_overflow(dtype: torch.dtype):
    before = torch.full((1000,), 300.0, dtype=dtype)
    assert float(relative_error(before, before * 2)) == pytest.approx(1.0, rel=1e-2)
    assert float(kl_divergence(before, before * 2)) == pytest.approx(0.0, abs=1e-5)


def test_outputs_of_another_structure_are_refused():
    with pytest.raises(ValueError, match="zip"):
        relative_error((torch.ones(2), torch.ones(2)), torch.ones(2))


@pytest.mark.parametrize("shape", [(5,), (4, 5), (2, 3, 5)])
def test_kl_divergence_is_the_mean_over_all_rows(shape: tuple[int, ...]):
    before, now = (torch.randn(shape, dtype=torch.float64) for _ in range(2))
    p, q = before.softmax(-1), now.softmax(-1)
    expected = (p * (p / q).log()).sum(-1).mean()
    torch.testing.assert_close(kl_divergence(before, now), expected)
    torch.testing.assert_close(kl_divergence(before, before + 3), torch.zeros((), dtype=torch.float64))
