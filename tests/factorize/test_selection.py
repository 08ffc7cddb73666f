"""``factorize_``: which layers are chosen, and with which ranks."""

from typing import Any

import pytest
from torch import nn

from dynarank.factorize import FactorizationReport, factorize_
from dynarank.layers.base import low_rank_layers

LAYERS = ["conv", "blocks.0.fc1", "blocks.0.fc2", "blocks.1.fc1", "blocks.1.fc2", "named.last.fc1", "named.last.fc2"]


def ranks(model: nn.Module) -> dict[str, int]:
    return {name: layer.rank for name, layer in low_rank_layers(model).items()}


def reasons(report: FactorizationReport) -> dict[str, str]:
    return {entry.name: entry.reason for entry in report.kept_dense}


# --- ranks -----------------------------------------------------------------------------------------------------------


def test_ranks_start_at_a_quarter():
    model = nn.Sequential(nn.Linear(40, 30), nn.Linear(30, 9), nn.Linear(9, 200), nn.Linear(200, 3), nn.Linear(3, 5))
    factorize_(model)
    assert ranks(model) == {"0": 8, "1": 2, "2": 2, "3": 1}


@pytest.mark.parametrize(("fraction", "rank"), [(0.1, 3), (0.5, 15), (1e-6, 1)])
def test_ranks_may_be_a_fraction(fraction: float, rank: int):
    model = nn.Sequential(nn.Linear(40, 30), nn.Linear(30, 9))
    factorize_(model, rank_fraction=fraction)
    assert ranks(model) == {"0": rank}


def test_layers_where_a_common_rank_does_not_pay_or_fit_stay_dense():
    model = nn.Sequential(nn.Linear(40, 30), nn.Linear(30, 12), nn.Linear(12, 8), nn.Linear(8, 9))
    report = factorize_(model, rank=9)
    assert ranks(model) == {"0": 9}
    assert reasons(report)["1"] == "rank 9 would not be smaller; at most 8 is"
    assert reasons(report)["2"] == "rank 9 is above min(m, n) = 8"


def test_layers_above_break_even_can_be_asked_for():
    model = nn.Sequential(nn.Linear(40, 30), nn.Linear(30, 12), nn.Linear(12, 8))
    report = factorize_(model, rank=9, keep_dense_above_break_even=False)
    assert ranks(model) == {"0": 9, "1": 9}
    assert [entry.after for entry in report.factorized] == [630, 360]


def test_tiny_layers_stay_dense():
    model = nn.Sequential(nn.Linear(2, 2), nn.Linear(1, 30), nn.Linear(30, 30), nn.Linear(30, 2))
    report = factorize_(model, rank="full")
    assert ranks(model) == {"2": 30}
    assert reasons(report)["0"] == reasons(report)["1"] == "too small: even rank 1 would hold as many numbers"


def test_layers_below_the_smallest_size_stay_dense():
    report = factorize_(model := nn.Sequential(nn.Linear(40, 30), nn.Linear(30, 20), nn.Linear(20, 2)), min_size=1000)
    assert ranks(model) == {"0": 8}
    assert reasons(report)["1"] == "600 entries, fewer than min_size = 1,000"


def test_more_specific_keys_win(net: Any):
    model = net
    pattern = {"linear": 2, r"blocks\..*": 3, "fc2": 4, "last.fc2": 5, "blocks.1.fc2": 6, "conv2d": 0.5}
    factorize_(model, rank=1, rank_pattern=pattern)
    assert ranks(model) == dict(zip(LAYERS, [8, 3, 4, 3, 6, 2, 5], strict=True))


def test_a_pattern_may_name_classes(net: Any):
    factorize_(net, rank=1, rank_pattern={nn.Conv2d: 5, "fc1": 2})
    assert ranks(net) == dict(zip(LAYERS, [5, 2, 1, 2, 1, 2, 1], strict=True))


def test_a_pattern_may_ask_for_full_rank(net: Any):
    model = net
    factorize_(model, rank_pattern={"conv": "full"})
    assert ranks(model)["conv"] == 16 and ranks(model)["blocks.0.fc1"] == 4


def test_spare_rows_are_stored_and_not_counted():
    model = nn.Sequential(nn.Linear(40, 30), nn.Linear(30, 9))
    report = factorize_(model, rank=3, rank_multiple=8)
    assert (model[0].rank, model[0].capacity) == (3, 8)
    assert report.factorized[0].after == 3 * 70


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"rank": 0}, ValueError, "rank: a rank must be at least 1, got 0"),
        ({"rank": 2.0}, TypeError, "rank must be an int or 'full', got 2.0|fraction of min"),
        ({"rank": 0.5}, TypeError, "rank must be an int or 'full', got 0.5. Pass rank_fraction"),
        ({"rank": True}, TypeError, "rank must be an int, a float in"),
        ({"rank": "auto"}, TypeError, "got 'auto'"),
        ({"rank_fraction": 0.0}, ValueError, r"must be in \(0, 1\], got 0.0"),
        ({"rank_fraction": 1.5}, ValueError, r"must be in \(0, 1\], got 1.5"),
        ({"rank": 2, "rank_fraction": 0.5}, ValueError, "takes one of rank, .* got rank and rank_f"),
        ({"rank_multiple": 0}, ValueError, "rank_multiple must be at least 1, got 0"),
        ({"rank_pattern": {"conv": 0}}, ValueError, r"rank_pattern\['conv'\]: a rank must be at least 1, got 0"),
        ({"rank_pattern": {"conv": 2.5}}, ValueError, r"rank_pattern\['conv'\]: a fraction .* got 2.5"),
        ({"rank_pattern": {"conv": None}}, TypeError, r"rank_pattern\['conv'\] must be an int, a float"),
        ({"rank_pattern": {"conv": 17}}, ValueError, r"rank must be between 1 and min\(m, n\) = 16, got 17"),
        ({"target_modules": [3]}, TypeError, "target_modules takes names and module classes, got 3"),
        ({"target_modules": int}, TypeError, "target_modules takes names and module classes, got <class 'int'>"),
        ({"target_modules": "*.fc1"}, ValueError, r"'\*.fc1' is no regular expression. Pass a list for names"),
    ],
)
def test_bad_options_are_refused_and_change_nothing(net: Any, options: Any, error: type[Exception], message: str):
    model = net
    before = list(model.modules())
    with pytest.raises(error, match=message):
        factorize_(model, **options)
    assert all(a is b for a, b in zip(model.modules(), before, strict=True))


# --- selection -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("target", "chosen"),
    [
        (None, LAYERS),
        ("all", LAYERS),
        ("linear", LAYERS[1:]),
        ("all-linear", LAYERS[1:]),
        ("conv", LAYERS[:1]),
        ("conv2d", LAYERS[:1]),
        (["fc1"], [LAYERS[1], LAYERS[3], LAYERS[5]]),
        (["blocks.1.fc1", "conv"], [LAYERS[0], LAYERS[3]]),
        (["last.fc2", nn.Conv2d], [LAYERS[0], LAYERS[6]]),
        (nn.Linear, LAYERS[1:]),
        ([nn.Linear], LAYERS[1:]),
        (r"blocks\.\d\.fc2", [LAYERS[2], LAYERS[4]]),
        (r"blocks\..*|head", [*LAYERS[1:5], "head"]),
        (["head"], ["head"]),
        (("c", "fc1")[1:], [LAYERS[1], LAYERS[3], LAYERS[5]]),
    ],
)
def test_targets(net: Any, target: Any, chosen: list[str]):
    model = net
    report = factorize_(model, rank=2, target_modules=target)
    assert list(ranks(model)) == chosen == [entry.name for entry in report.factorized]


@pytest.mark.parametrize(
    ("exclude", "left"),
    [
        ("conv", ["conv"]),
        (["fc1", "conv"], ["conv", *LAYERS[1::2]]),
        (r"blocks\..*", LAYERS[1:5]),
        ([nn.Conv2d], ["conv"]),
        (["norm", "named.last.fc2"], ["named.last.fc2"]),  # what has no twin may be excluded: it stays dense anyway
        (["head"], []),
    ],
)
def test_exclusions(net: Any, exclude: Any, left: list[str]):
    model = net
    report = factorize_(model, rank=2, exclude_modules=exclude)
    assert list(ranks(model)) == [name for name in LAYERS if name not in left]
    assert all(reasons(report)[name] == "named in exclude_modules" for name in left)


def test_exclusions_win_over_targets(net: Any):
    model = net
    report = factorize_(model, target_modules=["fc1", "fc2"], exclude_modules=["last.fc1"])
    assert reasons(report) == {
        "conv": "not named in target_modules",
        "named.last.fc1": "named in exclude_modules",
        "head": "not named in target_modules",
    }


@pytest.mark.parametrize("argument", ["target_modules", "exclude_modules"])
@pytest.mark.parametrize(
    ("choice", "hint"),
    [
        (["fc3"], "'fc3' matches no layer. Did you mean 'fc2' or 'fc1'"),
        (["blocks.2.fc1"], "Did you mean 'blocks.1.fc1' or 'blocks.0.fc1'"),
        (["blocks"], r"It holds 4 layers; the regular expression 'blocks\\\\..\*' stands for all of them"),
        (["zzz"], "Layers with a low-rank twin: conv, blocks.0.fc1, .*, head"),
        ("conv3d", "'conv3d' matches no layer. Did you mean 'conv'"),
        ("encoder.*", r"'encoder.\*' matches no layer. Layers with"),
        ([nn.Embedding], "'Embedding' matches no layer"),
    ],
)
def test_names_that_match_nothing_are_errors(net: Any, argument: str, choice: Any, hint: str):
    with pytest.raises(ValueError, match=f"{argument}: .*{hint}"):
        factorize_(net, **{argument: choice})


def test_a_target_without_a_twin_is_an_error(net: Any):
    with pytest.raises(ValueError, match=r"'norm' matches no layer. It is a BatchNorm2d, which has no low-rank twin"):
        factorize_(net, target_modules=["norm"])


def test_pattern_keys_that_match_nothing_are_errors(new_net: Any):
    with pytest.raises(ValueError, match=r"rank_pattern: 'fc3' matches no layer. Did you mean 'fc2'"):
        factorize_(new_net(), rank_pattern={"fc3": 2})
    with pytest.raises(
        ValueError, match=r"rank_pattern: 'head' has no effect, since 'head' is not replaced .classifier"
    ):
        factorize_(new_net(), rank_pattern={"head": 2})
    with pytest.raises(
        ValueError, match=r"'conv' has no effect, since 'conv' is not replaced .not named in target_modu"
    ):
        factorize_(new_net(), target_modules="linear", rank_pattern={"conv": 2})
