"""``factorize_(faster_in=...)``: layers that are faster dense stay dense, with the reason."""

from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from dynarank.calibration import Calibration, MeasuredCosts, speed_plan, this_machine
from dynarank.cost_model.work import OPERATORS, PURPOSES
from dynarank.factorize import FactorizationReport, deployed_parameters, factorize_

CALL, MULTIPLICATION, NUMBER = 5e-5, 3e-11, 1e-9
SHAPES = [(200, 150), (150, 200), (96, 96), (64, 700), (700, 64), (7, 5)]


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An empty folder in place of the user's cache."""
    monkeypatch.setenv("DYNARANK_CACHE_DIR", str(tmp_path))


class Layers(nn.Module):
    """Linear layers side by side, each on as many features as it takes."""

    def __init__(self, shapes: Sequence[tuple[int, int]]) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(n, m) for m, n in shapes)

    def forward(self, x: Tensor) -> Tensor:
        return torch.stack([layer(x[..., : layer.in_features]).mean(-1) for layer in self.layers])  # type: ignore[misc]


def calibrate_by_hand(*, slow: str = "", dtype: torch.dtype = torch.float32) -> None:
    """Keep times for this machine: of every operator the same, nine times those of some; in training thrice those."""
    times = {
        purpose: {
            name: tuple(
                (3 if purpose == "training" else 1) * (9 if slow and slow in name else 1) * time
                for time in (CALL, MULTIPLICATION, NUMBER, NUMBER, NUMBER)
            )
            for name in OPERATORS
        }
        for purpose in PURPOSES
    }
    Calibration(this_machine(dtype=dtype), MeasuredCosts(times), ()).save()  # type: ignore[arg-type]


def seconds(rows: int, *sizes: int) -> float:
    """Seconds of products ``(rows, n) (n, m)``, one for each pair of sizes in a row."""
    pairs = pairwise(sizes)
    return sum(CALL + MULTIPLICATION * rows * n * m + NUMBER * (rows * n + rows * m + n * m) for n, m in pairs)


def reasons(report: FactorizationReport) -> dict[str, str]:
    return {entry.name: entry.reason for entry in report.kept_dense}


# --- decisions -------------------------------------------------------------------------------------------------------


def factor_of_the_rule(shape: tuple[int, int], rows: int, purpose: str) -> float:
    """The table of docs/speed.md."""
    wide, size = min(shape) > 64, rows * shape[0] * shape[1]
    if purpose == "inference":
        return 0.8 if wide else 0.0
    if size >= 3e7:
        return 0.85
    return 0.6 if size >= 6e6 else 0.4 if size >= 2e6 and wide else 0.0


@pytest.mark.parametrize("purpose", ["training", "inference"])
@pytest.mark.parametrize("rows", [5, 40, 300, 2000])
@pytest.mark.parametrize(("fraction", "multiple"), [(0.02, 1), (0.3, 1), (0.3, 16), (0.45, 1)])
def test_without_a_calibration_the_rule_decides(purpose: Any, rows: int, fraction: float, multiple: int):
    model, x = Layers([*SHAPES, (600, 700)]), torch.randn(rows, 700)
    options: Any = {"rank_fraction": fraction, "rank_multiple": multiple, "include_head": True}
    left = {f"layers.{i}" for i in range(len(model.layers))}
    for name, (m, n) in zip(sorted(left), [*SHAPES, (600, 700)], strict=True):
        rank = max(1, round(fraction * min(m, n)))
        stored = min(-(-rank // multiple) * multiple, m, n)
        if stored > factor_of_the_rule((m, n), rows, purpose) * m * n / (m + n):
            left.remove(name)
    if not left:
        with pytest.raises(ValueError, match="replaced no layer"):
            factorize_(model, **options, example_inputs=x, faster_in=purpose)
        return
    report = factorize_(model, **options, example_inputs=x, faster_in=purpose)
    assert {entry.name for entry in report.factorized} == left
    assert all("by a rule of thumb" in reason for reason in reasons(report).values())
    assert not any(entry.note for entry in report.factorized if multiple == 1)  # a rule has no times
    assert speed_plan(model, x, for_=purpose).should_be_dense == ()


@pytest.mark.parametrize("purpose", ["training", "inference"])
@pytest.mark.parametrize("rows", [9, 800])
@pytest.mark.parametrize(("fraction", "multiple"), [(0.1, 1), (0.25, 16), (0.45, 1)])
def test_with_a_calibration_times_decide_and_are_reported(purpose: Any, rows: int, fraction: float, multiple: int):
    calibrate_by_hand(dtype=torch.float64)
    shapes = [*SHAPES, (600, 700)]
    model, x = Layers(shapes).double(), torch.randn(rows, 700, dtype=torch.float64)
    options: Any = {"rank_fraction": fraction, "rank_multiple": multiple, "include_head": True}
    report = factorize_(model, **options, example_inputs=x, faster_in=purpose)
    for (m, n), entry in zip(shapes, report.entries, strict=True):
        stored = min(-(-round(fraction * min(m, n)) // multiple) * multiple, m, n)
        dense, factored = seconds(rows, n, m), seconds(rows, n, stored, m)
        assert (entry.status == "dense") == (dense < factored)
        if entry.status == "dense":
            assert (
                f"would not be faster in {purpose} with {rows} rows; at most" in entry.reason
                or entry.reason.startswith(f"no rank would be faster in {purpose} with {rows} rows")
            )
            assert entry.reason.endswith(", by the calibration")
        else:
            assert entry.note == f"expected {dense / factored:.3g} times as fast"
    assert report.notes[-1] == f"Speed in {purpose} is expected by the calibration for {this_machine(dtype=x.dtype)}"


@pytest.mark.parametrize("purpose", ["training", "inference"])
def test_the_reason_names_the_rank_up_to_which_it_pays(purpose: Any):
    x, options = torch.randn(900, 512), {"include_head": True, "faster_in": purpose}
    report = factorize_(
        Layers([(256, 512), (512, 256)]), rank=150, rank_pattern={"layers.0": 9}, **options, example_inputs=x
    )  # type: ignore[arg-type]
    most = int({"training": 0.85, "inference": 0.8}[purpose] * 256 * 512 / 768)
    expected = f"rank 150 would not be faster in {purpose} with 900 rows; at most {most} is, by a rule of thumb"
    assert reasons(report) == {"layers.1": expected}
    for rank, count in ((most, 2), (most + 1, 1)):
        pattern: Any = {"layers.1": rank}
        report = factorize_(Layers([(256, 512)] * 2), rank=9, rank_pattern=pattern, **options, example_inputs=x)  # type: ignore[arg-type]
        assert len(report.factorized) == count


def test_layers_named_exactly_are_judged_too():
    model, x = nn.Sequential(nn.Linear(64, 64), nn.Linear(64, 512), nn.Linear(512, 512)), torch.randn(32, 64)
    report = factorize_(
        model, rank_pattern={"0": 3}, target_modules=["0", "2"], rank=40, example_inputs=x, faster_in="training"
    )
    assert reasons(report)["0"] == "no rank would be faster in training with 32 rows, by a rule of thumb"
    assert [entry.name for entry in report.factorized] == ["2"]


@pytest.mark.parametrize("last", [True, False])
def test_convolutions_are_judged_by_the_layout_of_their_inputs(last: bool):
    calibrate_by_hand(slow="channels last up")
    model, x = nn.Sequential(nn.Conv2d(64, 60, 3, stride=2), nn.Conv2d(60, 2, 1)), torch.randn(3, 64, 27, 27)
    layout = torch.channels_last if last else torch.contiguous_format
    options: Any = {"rank": 2, "example_inputs": x.to(memory_format=layout), "faster_in": "inference"}
    rows = 3 * 13 * 13
    dense, down, up = seconds(rows, 64 * 9, 60), seconds(rows, 64 * 9, 2), seconds(rows, 2, 60)
    assert down + up < dense < down + 9 * up
    if last:
        with pytest.raises(
            ValueError, match=rf"0 \(no rank would be faster in inference with {rows} rows, by the calib"
        ):
            factorize_(model, **options)
    else:
        (entry,) = factorize_(model, **options).factorized
        assert (entry.name, entry.note) == ("0", f"expected {dense / (down + up):.3g} times as fast")


class Shared(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.one = self.other = nn.Linear(70, 70)
        self.wide = nn.Linear(70, 2000)

    def forward(self, x: Tensor, scale: float = 1.0) -> Tensor:
        return self.wide(self.other(self.one(x))) * scale


@pytest.mark.parametrize(("rows", "dense"), [(1000, True), (1300, False)])
def test_a_shared_layer_is_judged_by_the_rows_of_a_call(rows: int, dense: bool):
    # 70 * 70 * 1000 is below 6e6, where 0.4 * 35 = 14 pays, 70 * 70 * 1300 is above, where it is 21.
    x, options = torch.randn(rows, 70), {"rank": 20, "include_head": True, "faster_in": "training"}
    report = factorize_(Shared(), **options, example_inputs=x)  # type: ignore[arg-type]
    seen = f"{2 * rows:,} rows in 2 calls"
    expected = {"one": f"rank 20 would not be faster in training with {seen}; at most 14 is, by a rule of thumb"}
    assert reasons(report) == (expected if dense else {})
    assert len(report.entries) == 2


@pytest.mark.parametrize("pack", [lambda x: (x, 2.0), lambda x: {"x": x, "scale": 2.0}])
def test_inputs_enter_as_arguments(pack: Any):
    report = factorize_(Shared(), rank=20, example_inputs=pack(torch.randn(1000, 70)), faster_in="inference")
    assert [entry.name for entry in report.factorized] == ["one"]


# --- what nothing is known of ----------------------------------------------------------------------------------------


class Unknown(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.tokens = nn.Embedding(50, 32)
        self.along = nn.Conv1d(32, 32, 3, padding=1)
        self.image = nn.Conv2d(8, 8, 3, padding=1)
        self.attention = nn.MultiheadAttention(32, 2, batch_first=True)
        self.spare = nn.Linear(40, 30)
        self.tiny = nn.Linear(32, 32)

    def forward(self, ids: Tensor) -> Tensor:
        z = self.along(self.tokens(ids).mT).mT
        z = self.image(z.unflatten(1, (8, -1)).float()).flatten(1, 2)
        return self.tiny(self.attention(z, z, z)[0]).sum()


@pytest.mark.parametrize(("form", "kind"), [("tucker", "conv2d_tucker"), ("spatial", "conv2d_spatial")])
@pytest.mark.parametrize("calibrated", [True, False])
def test_layers_without_known_times_are_factorised_as_before(form: Any, kind: str, calibrated: bool):
    if calibrated:
        calibrate_by_hand()
    model, ids = Unknown(), torch.zeros(2, 16, dtype=torch.long)
    targets = ["tokens", "along", "image", "out_proj", "spare", "tiny"]
    report = factorize_(model, rank=2, target_modules=targets, conv_form=form, example_inputs=ids, faster_in="training")
    assert list(reasons(report)) == ["attention.in_proj_weight", "tiny"]
    assert reasons(report)["tiny"].startswith("no rank would be faster in training with 32 rows")
    notes = {entry.name: entry.note.removeprefix("speed unknown: ") for entry in report.factorized}
    assert notes["tokens"] == "no times of embedding"
    assert notes["along"].startswith("no times of conv1d")
    assert notes["image"] == f"no times of {kind}"
    assert notes["spare"] == "it is not called with this batch"
    assert notes["attention.out_proj"].startswith("it is not called with this batch; nn.MultiheadAttention")


# --- the filling of a size -------------------------------------------------------------------------------------------


def test_no_rank_that_fills_a_size_is_larger_than_is_faster():
    model, x = nn.Sequential(*(nn.Linear(n, m) for n, m in [(300, 64), (64, 400), (400, 400), (400, 3)])), None
    x = torch.randn(40, 300)  # 400 * 400 * 40 is above 6e6, 300 * 64 * 40 and 400 * 64 * 40 are narrow and below
    before = deployed_parameters(model)
    report = factorize_(model, parameters=0.95, example_inputs=x, faster_in="training")
    assert {entry.name: entry.rank for entry in report.factorized} == {"2": int(0.6 * 200)}
    assert deployed_parameters(model) == before - 400 * 400 + 800 * 120


@pytest.mark.parametrize("parameters", [70_000, 100_000])
def test_what_stays_dense_counts_as_dense(parameters: int):
    model = nn.Sequential(*(nn.Linear(n, m) for n, m in [(300, 64), (64, 400), (400, 400), (400, 3)]))
    factorize_(model, parameters=parameters, example_inputs=torch.randn(40, 300), faster_in="training")
    assert parameters - 800 < deployed_parameters(model) <= parameters
    assert [type(layer) is nn.Linear for layer in model] == [True, True, False, True]


@pytest.mark.parametrize("multiple", [1, 16])
def test_stored_ranks_count(multiple: int):
    model = nn.Sequential(nn.Linear(400, 400), nn.Linear(400, 3))
    report = factorize_(
        model, parameters=1.0, rank_multiple=multiple, example_inputs=torch.randn(40, 400), faster_in="training"
    )
    assert report.factorized[0].rank == 120 // multiple * multiple


def test_a_size_that_cannot_be_kept_names_what_stays_dense():
    model = nn.Sequential(nn.Linear(60, 60), nn.Linear(60, 400), nn.Linear(400, 400), nn.Linear(400, 3))
    why = r"take .* Layers that stay dense: 0 \(no rank would be faster in training with 40 rows, by a rule"
    with pytest.raises(ValueError, match=why):
        factorize_(model, parameters=20_000, example_inputs=torch.randn(40, 60), faster_in="training")
    assert all(type(layer) is nn.Linear for layer in model)
    factorize_(model, parameters=20_000)


# --- the look changes nothing ----------------------------------------------------------------------------------------


def network() -> nn.Sequential:
    return nn.Sequential(
        nn.Linear(40, 80), nn.BatchNorm1d(80), nn.Dropout(), nn.Linear(80, 512), nn.Linear(512, 512), nn.Linear(512, 3)
    ).train()


def test_statistics_modes_hooks_gradients_and_randomness_stay():
    model, x = network(), torch.randn(64, 40) + 5
    model[1].eval()
    calls: list[int] = []
    handle = model[4].register_forward_hook(lambda *_: calls.append(1))
    state, statistics = torch.get_rng_state(), {k: v.clone() for k, v in model[1].state_dict().items()}
    report = factorize_(model, rank=30, example_inputs=x, faster_in="training")
    assert [entry.name for entry in report.factorized] == ["4"]
    assert torch.equal(torch.get_rng_state(), state)
    torch.testing.assert_close(model[1].state_dict(), statistics, atol=0, rtol=0)
    assert [module.training for module in model] == [True, False, True, True, True, True]
    assert [len(module._forward_hooks) for module in model] == [0, 0, 0, 0, 1, 0]
    assert all(parameter.grad is None for parameter in model.parameters())
    calls.clear()
    model(x)
    assert calls == [1]
    handle.remove()
    assert not model[4]._forward_hooks


def check_fails(model: nn.Sequential, **options: Any) -> None:
    before, weights = list(model), {name: value.clone() for name, value in model.state_dict().items()}
    with pytest.raises(ValueError):
        factorize_(model, include_head=True, faster_in="training", **options)
    assert list(model) == before and all(module.training for module in model)
    torch.testing.assert_close(model.state_dict(), weights, atol=0, rtol=0, equal_nan=True)
    assert not any(module._forward_hooks for module in model)


def test_a_failure_leaves_the_model_as_it_was():
    check_fails(network(), rank=30, example_inputs=torch.randn(64, 41))
    model = network()
    with torch.no_grad():
        model[4].weight[0, 0] = torch.nan  # type: ignore[index]
    check_fails(model, rank=30, example_inputs=torch.randn(64, 40))


def test_a_layer_that_stays_dense_is_the_same_layer():
    model = network()
    before = list(model)
    factorize_(model, rank=30, example_inputs=torch.randn(64, 40), faster_in="training")
    assert [old is new for old, new in zip(before, model, strict=True)] == [True, True, True, True, False, True]


# --- what is said ----------------------------------------------------------------------------------------------------


def test_the_report_prints_it():
    model = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 512), nn.Linear(512, 512), nn.Linear(512, 10))
    report = factorize_(
        model, rank=100, rank_pattern={"0": 9}, example_inputs=torch.zeros(64, 64), faster_in="training"
    )
    lines = str(report).splitlines()
    assert [line.split("  ")[-1] for line in lines[1:5]] == [
        "dense: no rank would be faster in training with 64 rows, by a rule of thumb",
        "dense: rank 100 is above min(m, n) = 64",
        "102,400",
        "dense: classifier head, seen to write the output",
    ]
    assert lines[-1] == (
        f"Speed in training is expected by a rule of thumb: there is no calibration for {this_machine()}. "
        "For times of this machine, run: dynarank calibrate"
    )
    calibrate_by_hand()
    report = factorize_(
        Layers([(512, 512)]), include_head=True, example_inputs=torch.zeros(640, 512), faster_in="training"
    )
    gain = seconds(640, 512, 512) / seconds(640, 512, 128, 512)
    assert str(report).splitlines()[1].endswith(f"131,072  expected {gain:.3g} times as fast")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"faster_in": "training"},
            "faster_in='training' needs example_inputs, a batch of the size that will be used: "
            "whether a low-rank layer is faster depends on the rows that it sees.",
        ),
        (
            {"faster_in": "deployment", "example_inputs": torch.zeros(3, 40)},
            "unknown faster_in 'deployment'. Available: inference, training.",
        ),
        (
            {"faster_in": "inference", "example_inputs": torch.zeros(1, 40), "exclude_modules": ["3", "4"]},
            "factorize_ replaced no layer: of 4 with a low-rank twin every one stays dense: 0 (no rank would be faster "
            "in inference with 1 row, by a rule of thumb), 3 (named in exclude_modules), 4 (named in exclude_modules), "
            "5 (classifier head, seen to write the output). Check rank, target_modules and include_head.",
        ),
    ],
)
def test_what_cannot_be(options: Any, message: str):
    model = network()
    with pytest.raises(ValueError) as caught:
        factorize_(model, **options)
    assert str(caught.value) == message
    assert model.training and type(model[0]) is nn.Linear
