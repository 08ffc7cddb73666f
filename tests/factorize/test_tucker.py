"""``factorize_`` with another form for convolutions, and all that is done with a model afterwards."""

import copy
import json
from math import prod
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import dynarank
from dynarank import tucker
from dynarank.compress import compress_, training_only
from dynarank.export import save_plain
from dynarank.factorize import dense_state_dict, deployed_parameters, factorize_, merge_, to_plain_
from dynarank.factorize.structure import restructure_, structure
from dynarank.history import History
from dynarank.layers.conv1d import LowRankConv1d
from dynarank.layers.conv2d import LowRankConv2d
from dynarank.layers.conv2d_spatial import LowRankSpatialConv2d
from dynarank.layers.conv2d_tucker import LowRankTuckerConv2d
from dynarank.optim.low_rank_optimizer import LowRankOptimizer
from dynarank.ranks.budget import Budget
from dynarank.schedules.periodic import Periodic

FORMS = ("tucker", "tucker4")


def new_net() -> Any:
    """Two real convolutions, a pointwise and a grouped one, and a head."""
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 16, 3, padding=1),
        nn.ReLU(),
        nn.Conv2d(16, 12, (3, 5), stride=2, padding=2, bias=False),
        nn.Conv2d(12, 20, 1),
        nn.Conv2d(20, 20, 3, groups=20, padding=1),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(400, 4),
    )


def images(dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(6, 3, 7, 8, generator=torch.Generator().manual_seed(1)).to(dtype)


def low_rank(form: Any = "tucker", **options: Any) -> Any:
    model = new_net()
    factorize_(model, conv_form=form, **({"rank_fraction": 0.5} | options))
    return model


def best(weight: Tensor, ranks: tuple[int, ...]) -> Tensor:
    """Return the weight, in float64, projected on the leading directions of one mode after the other."""
    W = weight.detach().double()
    for mode, rank in enumerate(ranks):
        rows = W.movedim(mode, 0)
        U = torch.linalg.svd(rows.flatten(1), full_matrices=False)[0][:, :rank]
        W = (U @ (U.mT @ rows.flatten(1))).reshape(rows.shape).movedim(0, mode)
    return W


# --- what becomes of each layer ----------------------------------------------------------------------------------


@pytest.mark.parametrize(("form", "ranks"), [("tucker", [(8, 2), (6, 8)]), ("tucker4", [(8, 2, 2, 2), (6, 8, 2, 2)])])
def test_a_fraction_is_that_of_each_mode_and_the_weight_is_the_best_in_reach(form: Any, ranks: list[Any]):
    dense, model = new_net(), new_net()
    report = factorize_(model, rank_fraction=0.5, conv_form=form)
    for index, wanted in zip((0, 2), ranks, strict=True):
        layer = model[index]
        assert type(layer) is LowRankTuckerConv2d
        assert layer.all_ranks == wanted == layer.all_capacities
        expected = best(dense[index].weight, wanted)
        torch.testing.assert_close(layer.to_dense().weight.double(), expected, atol=1e-6, rtol=0)
    assert [entry.kind for entry in report.factorized] == ["conv2d_tucker", "conv2d_tucker", "conv2d"]
    assert [entry.ranks for entry in report.factorized] == [*ranks, (6,)]
    assert model[0].bias is not None and torch.equal(model[0].bias, dense[0].bias)


@pytest.mark.parametrize(
    ("rank", "expected"),
    [
        (4, [(4, 3, 3, 3), (4, 4, 3, 4)]),
        (1, [(1, 1, 1, 1), (1, 1, 1, 1)]),
        ("full", [(16, 3, 3, 3), (12, 16, 3, 5)]),
    ],
)
def test_an_integer_is_the_cap_of_each_mode(rank: Any, expected: list[Any]):
    model = low_rank("tucker4", rank_fraction=None, rank=rank)
    assert [model[0].all_ranks, model[2].all_ranks] == expected


def test_no_rank_starts_above_the_product_of_the_others():
    model = nn.Sequential(nn.Conv2d(2, 40, 3), nn.ReLU(), nn.Flatten(), nn.Linear(40, 2))
    factorize_(model, rank_fraction=0.5, conv_form="tucker", keep_dense_above_break_even=False)
    assert model[0].all_ranks == (9, 1)
    full = nn.Sequential(nn.Conv2d(2, 40, 3), nn.ReLU(), nn.Flatten(), nn.Linear(40, 2))
    weight = full[0].weight.detach().clone()
    factorize_(full, rank="full", conv_form="tucker")
    layer: Any = full[0]
    assert layer.all_ranks == (18, 2)
    torch.testing.assert_close(layer.to_dense().weight, weight, atol=1e-6, rtol=0)


def test_all_other_layers_are_matrices_or_dense_and_the_report_says_why():
    model = nn.Sequential(
        nn.Conv1d(8, 8, 3), nn.Conv2d(12, 12, 1), nn.Conv2d(12, 12, 3, groups=2), nn.Linear(20, 20), nn.Linear(20, 4)
    )
    report = factorize_(model, rank=2, conv_form="tucker")
    assert [type(layer) for layer in model[:3]] == [LowRankConv1d, LowRankConv2d, nn.Conv2d]
    assert [entry.note for entry in report.factorized] == [
        "a matrix: only nn.Conv2d has the form tucker",
        "a matrix: its kernel is 1x1",
        "",
    ]
    assert report.kept_dense[0].reason == "grouped convolution (groups=2)"
    assert report.notes[-1] == "No layer took conv_form='tucker'."


def test_some_layers_can_have_other_ranks():
    model = new_net()
    factorize_(model, rank_fraction=0.5, conv_form="tucker", rank_pattern={"2": 3, "conv": 2})
    assert (model[0].all_ranks, model[2].all_ranks, model[3].rank) == ((2, 2), (3, 3), 2)


def test_a_layer_stays_dense_where_its_own_numbers_do_not_pay():
    model = new_net()
    report = factorize_(model, rank_fraction=1.0, conv_form="tucker", rank_pattern={"2": 6, "3": 2})
    numbers = 16 * 3 * 9 + 16 * 16 + 3 * 3
    assert report.kept_dense[0].reason == f"ranks (16, 3) would hold {numbers:,} numbers, not fewer than 432"
    assert type(model[0]) is nn.Conv2d and type(model[2]) is LowRankTuckerConv2d
    tiny = nn.Sequential(nn.Conv2d(1, 2, (1, 2)), nn.Conv2d(16, 16, 3), nn.Flatten(), nn.Linear(16, 2))
    report = factorize_(tiny, rank=1, conv_form="tucker")
    assert report.kept_dense[0].reason == "too small: even ranks of 1 would hold as many numbers"


@pytest.mark.parametrize("form", FORMS)
def test_the_report_counts_what_is_stored(form: Any):
    model = new_net()
    before = sum(p.numel() for p in model.parameters())
    report = factorize_(model, rank_fraction=0.5, conv_form=form)
    assert report.before == before
    assert report.after == sum(p.numel() for p in model.parameters()) == deployed_parameters(model)
    for entry, index in zip(report.factorized, (0, 2, 3), strict=True):
        assert entry.after == sum(p.numel() for p in model[index].parameters() if p.dim() > 1)
    text = str(report)
    assert " x ".join(map(str, model[2].all_ranks)) in text
    again = factorize_(model, conv_form=form)
    assert [e.status for e in again.entries[:2]] == ["low-rank before"] * 2
    assert [(e.ranks, e.after) for e in again.entries[:2]] == [(e.ranks, e.after) for e in report.entries[:2]]
    assert not again.notes or "took" not in again.notes[-1]
    json.dumps(report.as_dict())


def test_spare_rows_are_stored_but_not_deployed():
    model = low_rank(rank_multiple=8)
    assert model[2].all_ranks == (6, 8) and model[2].all_capacities == (8, 8)
    assert deployed_parameters(model) == deployed_parameters(low_rank())


def test_larger_than_dense_is_said():
    report = factorize_(new_net(), rank="full", conv_form="tucker")
    assert report.factorized[0].note == "larger than dense in training until its rank is cut"


def test_the_spatial_form_is_one_of_them():
    model = low_rank("spatial")
    assert type(model[0]) is type(model[2]) is LowRankSpatialConv2d and type(model[3]) is LowRankConv2d
    assert model[2].rank == round(0.5 * min(12 * 5, 16 * 3))


def test_an_unknown_form_is_refused():
    model = new_net()
    with pytest.raises(ValueError, match=r"conv_form.*tuker"):
        factorize_(model, conv_form="tuker")  # type: ignore[arg-type]
    assert type(model[0]) is nn.Conv2d


def test_an_attribute_that_the_layer_needs_keeps_a_convolution_dense():
    model = new_net()
    model[0].core = "mine"
    report = factorize_(model, rank_fraction=0.5, conv_form="tucker")
    assert report.kept_dense[0].reason == "its attribute 'core' means something else in a low-rank layer"
    model = new_net()
    model[0].tag = "mine"
    factorize_(model, rank_fraction=0.5, conv_form="tucker")
    assert model[0].tag == "mine"


# --- and back ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("back", [merge_, to_plain_])
def test_it_is_made_dense_or_plain_with_the_model(form: Any, back: Any):
    model = low_rank(form).double()
    expected = model(images(torch.float64))
    report = back(model)
    assert report.largest_error < 1e-12 and not any("dynarank" in type(m).__module__ for m in model.modules())
    torch.testing.assert_close(model(images(torch.float64)), expected, atol=1e-12, rtol=0)
    assert ("three layers" in str(report)) == (back is to_plain_)


@pytest.mark.parametrize("form", FORMS)
def test_the_dense_state_dict_is_that_of_the_dense_model(form: Any):
    model = low_rank(form)
    state = dense_state_dict(model)
    assert {k: v.shape for k, v in state.items()} == {k: v.shape for k, v in new_net().state_dict().items()}
    dense = new_net()
    dense.load_state_dict(state)
    torch.testing.assert_close(dense(images()), model(images()), atol=1e-5, rtol=0)


@pytest.mark.parametrize("form", FORMS)
def test_a_state_dict_brings_its_ranks_and_a_dense_one_is_truncated(form: Any):
    model, other = low_rank(form, rank_multiple=4), low_rank(form, rank_fraction=0.3)
    other.load_state_dict(model.state_dict())
    assert other[2].all_ranks == model[2].all_ranks and torch.equal(other(images()), model(images()))
    other = low_rank(form)
    other.load_state_dict(new_net().state_dict())
    torch.testing.assert_close(other(images()), low_rank(form)(images()), atol=1e-5, rtol=0)


# --- files -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_the_structure_comes_back(form: Any, dtype: torch.dtype):
    saved = low_rank(form, rank_multiple=4).to(dtype)
    saved[2].set_factors(
        tucker.truncate(saved[2].factors(), ranks=(3, 2, *saved[2].ranks[2:])), resize=False
    )  # fewer than fit the capacity
    model = new_net()
    restructure_(model, json.loads(json.dumps(structure(saved))))
    assert structure(model) == structure(saved)
    assert model[2].all_capacities == saved[2].all_capacities != saved[2].all_ranks
    model.load_state_dict(saved.state_dict())
    assert torch.equal(model.to(dtype)(images(dtype)), saved(images(dtype)))
    assert model[2].all_ranks[:2] == (3, 2)


@pytest.mark.parametrize("form", FORMS)
def test_a_compressed_file_loads_into_the_dense_architecture(form: Any, tmp_path: Path):
    saved = low_rank(form, rank_multiple=4)
    dynarank.save_compressed(tmp_path, saved)
    model = dynarank.load_compressed(tmp_path, new_net())
    assert structure(model) == structure(saved) and torch.equal(model(images()), saved(images()))
    again = dynarank.load_compressed(tmp_path, model)
    assert again is model
    other = new_net()
    other[2] = nn.Conv2d(16, 12, (3, 3), stride=2, padding=2, bias=False)
    with pytest.raises(ValueError, match="'2' has kernel_size"):
        dynarank.load_compressed(tmp_path, other)
    assert type(other[0]) is nn.Conv2d


@pytest.mark.parametrize("format", ["pt2", "onnx", "state_dict"])
def test_a_plain_file_computes_the_same(format: Any, tmp_path: Path):
    if format == "onnx":
        pytest.importorskip("onnx")
    suffix = {"pt2": ".pt2", "onnx": ".onnx", "state_dict": ".safetensors"}[format]
    model = low_rank("tucker4", rank_multiple=8)
    stored, dense = structure(model), sum(p.nbytes for p in new_net().parameters())
    report = save_plain(tmp_path / f"m{suffix}", model, images(), format=format)
    assert structure(model) == stored
    assert report.largest_difference < 1e-5 and report.dense_bytes == dense
    assert [layer.ranks for layer in report.layers] == [(8, 2, 2, 2), (6, 8, 2, 2), (6,)]


def test_a_checkpoint_with_a_report_of_the_run(tmp_path: Path):
    def start(model: nn.Module) -> LowRankOptimizer:
        return LowRankOptimizer(model, rank_policy=Budget(0.5), schedule=Periodic(4, freeze=16))

    def train(model: nn.Module, optimizer: LowRankOptimizer, steps: int) -> None:
        for _ in range(steps):
            optimizer.zero_grad()
            model(images()).square().mean().backward()
            optimizer.step()

    model, history = low_rank(), History(tmp_path / "history.jsonl")
    optimizer = start(model)
    history.describe(ranks=optimizer.kept_ranks)
    optimizer.on_rank_event(lambda events: [history.record(event) for event in events])
    train(model, optimizer, 9)
    dynarank.save(tmp_path / "saved", model=model, optimizer=optimizer)
    resumed = low_rank(rank_fraction=0.25)
    second = start(resumed)
    dynarank.load(tmp_path / "saved", model=resumed, optimizer=second)
    assert resumed[2].all_ranks == model[2].all_ranks
    train(model, optimizer, 6)
    train(resumed, second, 6)
    for one, two in zip(model.state_dict().values(), resumed.state_dict().values(), strict=True):
        assert torch.equal(one, two)
    assert set(history.ranks()) == {"0[out]", "0[in]", "2[out]", "2[in]", "3"}
    page = dynarank.write_report(tmp_path / "history.jsonl", tmp_path / "report.html")
    assert "2[in]" in Path(page).read_text()


# --- what looks at a model ---------------------------------------------------------------------------------------


def test_the_summary_shows_the_ranks_of_all_modes():
    model = low_rank(rank_multiple=4)
    summary = dynarank.summary(model, torch.optim.AdamW(model.parameters()))
    assert [entry.ranks for entry in summary.layers] == [(8, 2), (6, 8), (6,)]
    assert [entry.capacities for entry in summary.layers] == [(8, 3), (8, 8), (8,)]
    layer, others = model[2], sum(p.numel() for p in (model[0].bias, model[3].bias, *model[4:].parameters()))
    assert summary.layers[1].parameters == 6 * 8 * 15 + 6 * 12 + 8 * 16 == layer.deployed_parameters()
    assert summary.layers[1].dense_parameters == prod(layer.weight_shape)
    assert summary.other_parameters == others
    assert summary.layers[1].driver == "AdamW: plain U V^T"
    assert "6 x 8" in str(summary) and "8 x 8" in str(summary)


def test_compression_leaves_them_and_says_so():
    model = low_rank()
    kept = model[2]
    report = compress_(model, budget=0.97, target_modules=["2", "3"])
    assert model[2] is kept
    assert "a convolution in Tucker form; merge_ it to choose another form" in str(report)


def test_only_some_layers_can_be_trained():
    model = low_rank()
    flags = {name: p.requires_grad for name, p in model.named_parameters()}

    def trained(only: Any) -> set[str]:
        with training_only(model, only):
            return {name for name, p in model.named_parameters() if p.requires_grad}

    assert trained(["2"]) == {"2.core", "2.out_basis", "2.in_basis"}
    assert trained("core") == {"3.S", "0.bias", "3.bias", "4.bias", "7.bias"}
    assert {name: p.requires_grad for name, p in model.named_parameters()} == flags


def test_a_copy_is_independent():
    model = low_rank()
    twin = copy.deepcopy(model)
    with torch.no_grad():
        twin[2].core.zero_()
    assert model[2].core.abs().max() > 0 and twin[2].all_ranks == model[2].all_ranks
