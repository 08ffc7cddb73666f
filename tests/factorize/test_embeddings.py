"""Embeddings are factorised only where the caller asks for them, and come back as they were."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from dynarank.factorize import deployed_parameters, factorize_, merge_, to_plain_
from dynarank.factorize.sites import choose_sites
from dynarank.factorize.structure import structure
from dynarank.layers.base import low_rank_layers
from dynarank.layers.embedding import LowRankEmbedding

REASON = "embedding; name it in target_modules to factorise it"


class Reader(nn.Module):
    """Tokens and positions, a layer, and a head."""

    def __init__(self, **options: Any) -> None:
        super().__init__()
        self.tokens = nn.Embedding(40, 16, **options)
        self.positions = nn.Embedding(9, 16)
        self.fc = nn.Linear(16, 17)
        self.head = nn.Linear(17, 5)

    def forward(self, tokens: Tensor) -> Tensor:
        features = self.tokens(tokens) + self.positions.weight[: tokens.shape[-1]]
        return self.head(self.fc(features).relu().mean(-2))


def reasons(report: Any) -> dict[str, str]:
    return {entry.name: entry.reason for entry in report.kept_dense}


@pytest.mark.parametrize("target", [None, "all", [nn.Module], ["fc"]])
@pytest.mark.parametrize("include_head", [False, True])
def test_embeddings_stay_dense_unless_they_are_named(target: Any, include_head: bool):
    model = Reader()
    why = reasons(factorize_(model, rank=2, target_modules=target, include_head=include_head))
    assert type(model.tokens) is type(model.positions) is nn.Embedding
    assert why["tokens"] == (REASON if target != ["fc"] else "not named in target_modules")


@pytest.mark.parametrize(
    ("target", "chosen"),
    [
        (["tokens"], ["tokens"]),
        (["tokens", "fc"], ["tokens", "fc"]),
        (r"tok.*|head", ["tokens", "head"]),
        ("embedding", ["tokens", "positions"]),
        (nn.Embedding, ["tokens", "positions"]),
        ([nn.Embedding, "fc"], ["tokens", "positions", "fc"]),
    ],
)
def test_embeddings_can_be_named(target: Any, chosen: list[str]):
    model = Reader()
    report = factorize_(model, rank=3, target_modules=target)
    assert list(low_rank_layers(model)) == chosen == [entry.name for entry in report.factorized]
    entry = report.factorized[0]
    assert (entry.kind, entry.shape, entry.before, entry.after) == ("embedding", (40, 16), 640, 3 * 56)
    assert report.after == deployed_parameters(model)


def test_a_rank_pattern_alone_chooses_no_embedding():
    with pytest.raises(ValueError, match=f"'tokens' has no effect, since 'tokens' is not replaced .{REASON}"):
        factorize_(Reader(), rank_pattern={"tokens": 3})
    model = Reader()
    factorize_(model, target_modules=["tokens", "fc"], rank=2, rank_pattern={"tokens": 5})
    assert (model.tokens.rank, model.fc.rank) == (5, 2)


def test_a_model_of_embeddings_alone_says_what_to_do():
    with pytest.raises(ValueError, match=f"every one stays dense: 0 .{REASON}"):
        factorize_(nn.Sequential(nn.Embedding(9, 8)))


def test_an_embedding_is_never_taken_for_the_head():
    model = nn.Sequential(nn.Linear(8, 8), nn.Flatten(), nn.Embedding(9, 8))
    assert reasons(factorize_(model, rank=2, include_head=True))["2"] == REASON
    model = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 9), nn.Embedding(9, 8))
    assert reasons(factorize_(model, rank=2))["1"] == "classifier head, the last layer of nn.Sequential"


@pytest.mark.parametrize(
    ("options", "why"),
    [
        ({"max_norm": 1.0}, "max_norm=1.0: it rescales the rows"),
        ({"scale_grad_by_freq": True}, "scale_grad_by_freq=True: gradients divided by counts"),
        ({"sparse": True}, "sparse=True: every row that is looked up moves"),
    ],
)
def test_options_that_factors_cannot_follow_keep_an_embedding_dense(options: Any, why: str):
    report = factorize_(Reader(**options), rank=2, target_modules=["tokens", "fc"])
    assert [entry.name for entry in report.factorized] == ["fc"]
    assert reasons(report)["tokens"].startswith(why)


def test_a_padding_row_that_is_not_zero_is_an_error_and_changes_nothing():
    model = Reader(padding_idx=4)
    with torch.no_grad():
        model.tokens.weight[4] = 1
    tokens = model.tokens
    with pytest.raises(ValueError, match="left the model as it was: tokens: the row of padding_idx = 4 must be zero"):
        factorize_(model, rank=2, target_modules=["tokens", "fc"])
    assert model.tokens is tokens and not low_rank_layers(model)


def test_an_embedding_that_is_tied_to_the_head_stays_dense():
    model = Reader()
    model.fc, model.head = nn.Linear(16, 16), nn.Linear(16, 40, bias=False)
    model.head.weight = model.tokens.weight
    report = factorize_(model, rank=2, target_modules=["tokens", "head", "fc"])
    assert [entry.name for entry in report.factorized] == ["fc"]
    assert reasons(report)["tokens"] == "its weight is tied to 'head'"
    assert reasons(report)["head"] == "its weight is tied to 'tokens'"
    assert model.head.weight is model.tokens.weight


def test_a_shared_embedding_is_replaced_at_every_place():
    model = nn.ModuleDict({"encoder": nn.Embedding(20, 16), "fc": nn.Linear(16, 16)})
    model["decoder"] = model["encoder"]
    factorize_(model, rank=2, target_modules=["encoder"])
    assert model["encoder"] is model["decoder"] and isinstance(model["encoder"], LowRankEmbedding)


@pytest.mark.parametrize("padding", [None, 0, 4])
@pytest.mark.parametrize("form", ["pair", "core"])
@pytest.mark.parametrize("way_back", [merge_, to_plain_])
def test_an_embedding_comes_back(way_back: Any, form: Any, padding: int | None):
    model = Reader(padding_idx=padding).double()
    factorize_(model, rank=3, target_modules=["tokens"])
    model.tokens.set_factors(model.tokens.factors(), form=form)
    tokens = torch.tensor([[0, 4, 7, 39], [1, 1, 0, 2]])
    y = model(tokens)
    report = way_back(model)
    assert report.largest_error < 1e-14
    torch.testing.assert_close(model(tokens), y)
    if way_back is merge_:
        assert type(model.tokens) is nn.Embedding and "bias" not in vars(model.tokens)
        again = factorize_(model, rank=3, target_modules=["tokens"])
        assert [entry.name for entry in again.factorized] == ["tokens"]
        torch.testing.assert_close(model(tokens), y)
    else:
        assert [type(part) for part in model.tokens] == [nn.Embedding, nn.Linear]
        assert model.tokens[0].padding_idx == padding


def test_compression_leaves_embeddings_alone_dense_or_not():
    model = Reader()
    factorize_(model, rank=2, target_modules=["tokens"])
    found = {one.site.name: one.reason for one in choose_sites(model)}
    assert found["tokens"] == found["positions"] == "an embedding: its rows are looked up, not multiplied"
    assert found["fc"] == "" and found["head"].startswith("classifier head")
    with pytest.raises(ValueError, match="'tokens' matches no layer"):
        choose_sites(model, target_modules=["tokens"])


def test_a_sequence_of_an_embedding_and_a_low_rank_layer_is_no_chain():
    model = nn.Sequential(nn.Sequential(nn.Embedding(9, 8), nn.Linear(8, 20)), nn.Linear(20, 3))
    factorize_(model, rank=2, target_modules=["0.0", "0.1"])
    assert [(name, entry["kind"]) for name, entry in structure(model).items()] == [
        ("0.0", "embedding"),
        ("0.1", "linear"),
    ]
