"""Which form each layer of a model should have: decided by costs made by hand, applied to the model."""

import copy
import json
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from dynarank.calibration import Calibration, MeasuredCosts, RuleOfThumb, Work, speed_plan, this_machine
from dynarank.factorize import factorize_
from dynarank.layers.conv2d import LowRankConv2d
from dynarank.layers.embedding import LowRankEmbedding
from dynarank.layers.linear import LowRankLinear


class Network(nn.Module):
    """A convolution, a shared layer called twice, a narrow one, and one that is not called."""

    def __init__(self, *, rank: int) -> None:
        super().__init__()
        self.conv = LowRankConv2d(3, 64, 3, padding=1, rank=20)
        self.linear = LowRankLinear(64, 64, rank=rank)
        self.head = LowRankLinear(64, 9, rank=2)
        self.spare = LowRankLinear(7, 7, rank=2)
        self.dense = nn.Linear(9, 9)

    def forward(self, x: Tensor) -> Tensor:
        z = self.conv(x).flatten(2).mT  # (B, positions, 64)
        return self.dense(self.head(self.linear(self.linear(z)).mean(1)))


def frozen(model: nn.Module) -> Any:
    """What must stay as it is."""
    return (
        {name: tensor.tolist() for name, tensor in model.state_dict().items()},
        [module.training for module in model.modules()],
        [len(module._forward_hooks) for module in model.modules()],
        [getattr(module, "multiplies_out_from", None) for module in model.modules()],
        [type(module) for module in model.modules()],
        torch.get_rng_state().tolist(),
    )


@pytest.mark.parametrize("purpose", ["training", "inference"])
def test_a_plan_says_what_each_layer_sees_and_changes_nothing(costs: MeasuredCosts, purpose: Any):
    model, x = Network(rank=30).train(), torch.randn(2, 3, 8, 8)
    before = frozen(model)
    plan = speed_plan(model, x, for_=purpose, costs=costs)
    assert frozen(model) == before
    conv, linear, head = plan.layers
    assert [(c.name, c.shape, c.rank, c.rows) for c in (conv, linear, head)] == [
        ("conv", (64, 27), 20, 2 * 64),
        ("linear", (64, 64), 30, 2 * 2 * 64),
        ("head", (9, 64), 2, 2),
    ]
    assert plan.skipped == {"spare": "it is not called with this batch"}
    assert linear.seconds == costs.seconds(Work("linear", (64, 64), 30, rows=128, calls=2), purpose)
    assert plan.totals is not None
    assert plan.totals["now"] == pytest.approx(sum(c.seconds[c.now] for c in plan.layers if c.seconds))
    assert plan.totals["plan"] <= plan.totals["now"]
    assert json.loads(json.dumps(plan.as_dict()))["totals"] == plan.totals


@pytest.mark.parametrize("rows", [64, 4000])
@pytest.mark.parametrize("shape", [(96, 200), (200, 96)])
@pytest.mark.parametrize("purpose", ["training", "inference"])
def test_a_layer_at_its_break_even_stays_factored_and_one_above_does_not(
    costs: MeasuredCosts, rows: int, shape: tuple[int, int], purpose: Any
):
    even = costs.break_even_rank(Work("linear", shape, 1, rows), purpose)
    assert 1 <= even < min(shape)
    model = nn.Sequential(*(LowRankLinear(shape[1], shape[0], rank=rank) for rank in (even, even + 1)))
    forward = lambda model, x: [layer(x) for layer in model]  # noqa: E731
    plan = speed_plan(model, torch.zeros(rows, shape[1]), for_=purpose, costs=costs, forward=forward)
    assert [layer.fastest == "dense" for layer in plan.layers] == [False, True]
    assert plan.should_be_dense == ("1",)
    if purpose == "inference":
        assert [layer.choice for layer in plan.layers] == ["factored", "dense"]
        assert plan.apply_(model) == ("1",)
        assert [type(layer) for layer in model] == [LowRankLinear, nn.Linear]
    else:
        assert "dense" not in [layer.choice for layer in plan.layers]
        assert "should have stayed dense" in str(plan)
        assert "Faster if they had stayed dense: 1." in str(plan)


def test_merging_leaves_the_outputs_and_exactly_the_other_layers(costs: MeasuredCosts):
    model, x = Network(rank=8).double().eval(), torch.randn(32, 3, 8, 8, dtype=torch.float64)
    plan = speed_plan(model, x, for_="inference", costs=costs)
    merged = {layer.name for layer in plan.layers if layer.choice == "dense"}
    assert {"head"} <= merged < {"conv", "linear", "head"}
    before = model(x)
    twin = copy.deepcopy(model)
    assert set(plan.apply_(model)) == merged
    torch.testing.assert_close(model(x), before, atol=1e-12, rtol=0)
    for name in ("conv", "linear", "head", "spare"):
        assert isinstance(getattr(model, name), type(getattr(twin, name))) == (name not in merged)


@pytest.mark.parametrize("names", [("all", "conv"), ("linear", "x.linear"), ("a+b", "aab")])
def test_only_the_layer_itself_is_merged_whatever_its_name(costs: MeasuredCosts, names: tuple[str, str]):
    class Named(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            first, second = (self.get_submodule(name) for name in names)
            return second(x) + first(x)

    model = Named()
    model.x = nn.Module()
    for name, rank in zip(names, (90, 5), strict=True):
        parent, _, last = name.rpartition(".")
        model.get_submodule(parent).add_module(last, LowRankLinear(96, 96, rank=rank))
    plan = speed_plan(model, torch.zeros(500, 96), for_="inference", costs=costs)
    assert plan.apply_(model) == (names[0],)
    assert isinstance(model.get_submodule(names[0]), nn.Linear)
    assert isinstance(model.get_submodule(names[1]), LowRankLinear)


@pytest.mark.parametrize("rows", [40, 2000])
def test_training_multiplies_out_where_that_is_faster_and_follows_the_rank(costs: MeasuredCosts, rows: int):
    model: Any = nn.Sequential(LowRankLinear(96, 80, rank=70)).double()
    model[0].multiplies_out_from = 1
    x = torch.randn(rows, 96, dtype=torch.float64)
    plan = speed_plan(model, x, costs=costs)
    (layer,) = plan.layers
    assert layer.seconds is not None
    faster = layer.seconds["multiplied"] < layer.seconds["factored"]
    assert (layer.now, layer.choice) == ("multiplied", "multiplied" if faster else "factored")
    assert faster == (rows == 2000)
    before, state = model(x).detach(), {name: value.clone() for name, value in model.state_dict().items()}
    assert plan.apply_(model) == (() if faster else ("0",))
    torch.testing.assert_close(model(x), before, atol=1e-12, rtol=0)
    torch.testing.assert_close(model.state_dict(), state, atol=0, rtol=0)
    again = speed_plan(model, x, costs=costs)
    assert again.layers[0].now == again.layers[0].choice == layer.choice
    assert again.apply_(model) == ()
    model[0].set_weight_(torch.randn(80, 96, dtype=torch.float64), rank=3)
    assert speed_plan(model, x, costs=costs).layers[0].now == "factored"


@pytest.mark.parametrize("active", [None, 4])
def test_the_rank_is_that_of_what_is_multiplied(costs: MeasuredCosts, active: int | None):
    layer = LowRankLinear(64, 64, rank=5, rank_multiple=8)
    layer.active_rank = active
    (choice,) = speed_plan(nn.Sequential(layer), torch.zeros(3, 64), costs=costs).layers
    assert choice.rank == (8 if active is None else 4)


def test_convolutions_are_told_apart_by_the_layout_of_their_inputs(costs: MeasuredCosts):
    times = costs.operators["inference"]
    slow = {name: tuple(4 * time for time in value) if "last" in name else value for name, value in times.items()}
    by = MeasuredCosts({"inference": slow})  # type: ignore[arg-type]
    model, x = nn.Sequential(LowRankConv2d(6, 9, 3, rank=2)), torch.zeros(2, 6, 8, 8)
    plain = speed_plan(model, x, for_="inference", costs=by).layers[0].seconds
    last = speed_plan(model, x.to(memory_format=torch.channels_last), for_="inference", costs=by).layers[0].seconds
    assert plain is not None and last is not None
    assert last["dense"] == pytest.approx(4 * plain["dense"])
    assert last["factored"] == pytest.approx(4 * plain["factored"])


# --- where the costs come from ---------------------------------------------------------------------------------------


def test_without_a_calibration_the_rule_decides_and_there_are_no_times():
    model: Any = nn.Sequential(LowRankLinear(256, 256, rank=100))
    x = torch.zeros(2048, 256)
    plan = speed_plan(model, x, for_="inference")
    (layer,) = plan.layers
    assert (layer.choice, layer.seconds, layer.gain, plan.totals) == ("factored", None, None, None)
    assert plan == speed_plan(model, x, for_="inference")
    assert "rule of thumb" in str(plan) and "dynarank calibrate" in str(plan)
    model[0].set_weight_(torch.randn(256, 256), rank=103)  # 0.8 * 128 = 102.4
    assert speed_plan(model, x, for_="inference").layers[0].choice == "dense"


def test_a_calibration_of_this_machine_is_found_for_its_type_only(costs: MeasuredCosts):
    Calibration(this_machine(), costs, ()).save()
    model, x = nn.Sequential(LowRankLinear(64, 64, rank=10)), torch.zeros(20, 64)
    plan = speed_plan(model, x)
    assert plan.layers == speed_plan(model, x, costs=costs).layers
    assert plan.source == f"the calibration for {this_machine()}"
    assert speed_plan(model.double(), x.double()).layers[0].seconds is None


# --- what is left alone, and what is refused -------------------------------------------------------------------------


def test_layers_without_a_model_of_their_time_are_named(costs: MeasuredCosts):
    class Text(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embedding = LowRankEmbedding(20, 8, rank=2)
            self.attention = nn.MultiheadAttention(8, 2, batch_first=True)
            self.core = LowRankLinear(8, 8, rank=2)
            self.core.set_factors(self.core.point(), form="core")

        def forward(self, x: Tensor) -> Tensor:
            z = self.embedding(x)
            return self.core(self.attention(z, z, z)[0])

    model = Text()
    factorize_(model, rank=2, target_modules=["out_proj"], include_head=True)
    plan = speed_plan(model, torch.zeros(2, 5, dtype=torch.long), costs=costs)
    assert plan.layers == () and plan.apply_(model) == ()
    assert plan.skipped == {
        "embedding": "times of a LowRankEmbedding are not known",
        "attention.out_proj": "nn.MultiheadAttention reads its weight, multiplied out in every pass; "
        "merge_ it for inference",
        "core": "times of the core form are not known",
    }
    assert "Left alone: core: times of the core form are not known." in str(plan)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (
            lambda: speed_plan(nn.Sequential(nn.Linear(4, 4)), torch.zeros(2, 4)),
            "speed_plan found no low-rank layer in the model. factorize_ it first.",
        ),
        (
            lambda: speed_plan(nn.Sequential(LowRankLinear(4, 4, rank=1)), torch.zeros(2, 4), for_="deployment"),  # type: ignore[arg-type]
            "unknown purpose 'deployment'. Available: inference, training.",
        ),
    ],
)
def test_bad_input_is_named(make: Callable[[], object], message: str):
    with pytest.raises(ValueError) as caught:
        make()
    assert str(caught.value) == message


@pytest.mark.parametrize("other", [LowRankLinear(64, 32, rank=3), nn.Linear(64, 64)])
def test_a_plan_for_another_model_is_refused(other: nn.Module):
    plan = speed_plan(nn.Sequential(LowRankLinear(64, 64, rank=3)), torch.zeros(2, 64), costs=RuleOfThumb())
    with pytest.raises(ValueError, match=r"a low-rank layer '0' of shape \(64, 64\), which the model lacks"):
        plan.apply_(nn.Sequential(other))
