"""Laws of GPT: the plain formula, no look into the future, narrower ones never exceed the size asked for."""

import math
from itertools import pairwise

import pytest
import torch
from torch.nn import functional

import dynarank
from dynarank.factorize import deployed_parameters
from dynarank.models.gpt import GPT, Block, gpt_parameters

SMALL = {"layers": 2, "heads": 2, "width": 6, "context": 5}


def test_the_count_is_the_formula_by_hand():
    block = 4 * (128 * 128 + 128) + (128 * 512 + 512) + (512 * 128 + 128) + 2 * 2 * 128
    embeddings, norm, head = (65 + 128) * 128, 2 * 128, 128 * 65
    assert deployed_parameters(GPT(65)) == embeddings + 4 * block + norm + head


@pytest.mark.parametrize(("heads", "width", "mlp_ratio"), [(1, 1, 4), (3, 6, 1.5), (2, 10, 0.3)])
def test_the_formula_counts_every_parameter(heads: int, width: int, mlp_ratio: float):
    model = GPT(11, layers=3, heads=heads, width=width, context=7, mlp_ratio=mlp_ratio)
    assert gpt_parameters(11, layers=3, width=width, hidden=model.hidden, context=7) == deployed_parameters(model)
    assert model(torch.zeros(2, 7, dtype=torch.int64)).shape == (2, 7, 11)


def test_every_matrix_has_a_readable_name():
    layers = [name for name, module in GPT(11, **SMALL).named_modules() if isinstance(module, torch.nn.Linear)]
    kinds = ("query", "key", "value", "out", "up", "down")
    assert layers == [*(f"blocks.{block}.{kind}" for block in range(2) for kind in kinds), "head"]


def test_a_block_is_the_plain_formula():
    block = Block(6, 2, 7).double()
    features = torch.randn(3, 5, 6, dtype=torch.float64)
    x = functional.layer_norm(features, (6,))
    heads = []
    for columns in (slice(0, 3), slice(3, 6)):
        query, key, value = (layer(x)[..., columns] for layer in (block.query, block.key, block.value))
        scores = query @ key.mT / math.sqrt(3)
        scores = scores.masked_fill(torch.ones(5, 5).triu(1).bool(), -math.inf)
        heads.append(scores.softmax(-1) @ value)
    features_1 = features + block.out(torch.cat(heads, -1))
    expected = features_1 + block.down(functional.gelu(block.up(functional.layer_norm(features_1, (6,)))))
    torch.testing.assert_close(block(features), expected)


def test_the_future_does_not_change_the_past():
    model = GPT(11, **SMALL).double()
    tokens = torch.randint(11, (3, 5))
    logits = model(tokens)
    for time in range(5):
        changed = tokens.clone()
        changed[:, time] = (tokens[:, time] + 1) % 11
        after = model(changed)
        torch.testing.assert_close(after[:, :time], logits[:, :time], atol=1e-14, rtol=0)
        assert (after - logits)[:, time:].abs().amax((0, 2)).min() > 1e-8


def test_a_shorter_sequence_has_the_same_logits():
    model = GPT(11, **SMALL).double()
    tokens = torch.randint(11, (3, 5))
    torch.testing.assert_close(model(tokens[:, :3]), model(tokens)[:, :3])


def test_the_branches_start_smaller_the_deeper_the_network():
    model = GPT(65, layers=8, width=64)
    for name, parameter in model.named_parameters():
        if parameter.dim() == 2:
            deviation = 0.02 / 4 if name.endswith(("out.weight", "down.weight")) else 0.02
            torch.testing.assert_close(parameter.std().item(), deviation, atol=0, rtol=0.05)
        elif "norm" in name and name.endswith("weight"):
            assert torch.equal(parameter, torch.ones(64))
        else:
            assert not parameter.any()


def test_dropout_acts_in_training_only():
    model = GPT(11, **SMALL, dropout=0.5)
    tokens = torch.randint(11, (3, 5))
    assert not torch.equal(model(tokens), model(tokens))
    model.eval()
    assert torch.equal(model(tokens), model(tokens))
    plain = GPT(11, **SMALL)
    plain.load_state_dict(model.state_dict())
    assert torch.equal(plain(tokens), model(tokens))


@pytest.mark.parametrize("share", [0.02, 0.05, 0.1, 0.2, 0.33, 0.5, 0.8, 0.95])
def test_narrower_never_exceeds_and_comes_close(share: float):
    model = GPT(65)
    parameters = int(share * deployed_parameters(model))
    narrower = model.narrower(parameters)
    assert 0.98 * parameters < deployed_parameters(narrower) <= parameters
    assert (narrower.layers, narrower.heads, narrower.context, narrower.vocabulary) == (4, 4, 128, 65)
    assert narrower.width <= 128
    assert 4 * narrower.width <= narrower.hidden <= 512
    again = model.narrower(parameters)
    assert (again.width, again.hidden) == (narrower.width, narrower.hidden)


def test_narrower_grows_with_the_size_asked_for():
    model = GPT(11, layers=2, heads=3, width=24, context=7, mlp_ratio=2.5)
    counts = [deployed_parameters(model.narrower(parameters)) for parameters in range(500, 11_000, 100)]
    assert all(before <= after for before, after in pairwise(counts))


@pytest.mark.parametrize("mlp_ratio", [4, 1.7, 0.1])
def test_narrower_is_the_model_itself_at_its_own_count_and_beyond(mlp_ratio: float):
    model = GPT(11, **SMALL, mlp_ratio=mlp_ratio, dropout=0.1)
    for parameters in (deployed_parameters(model), 10**9):
        narrower = model.narrower(parameters)
        assert (narrower.width, narrower.hidden, narrower.dropout) == (6, model.hidden, 0.1)


def test_narrower_names_the_smallest_size():
    smallest = deployed_parameters(GPT(65, width=4))
    assert GPT(65).narrower(smallest).width == 4
    with pytest.raises(ValueError, match=f"parameters must be at least {smallest}, got {smallest - 1}"):
        GPT(65).narrower(smallest - 1)


def test_every_matrix_but_the_head_can_be_factorised():
    model = GPT(11, **SMALL)
    report = dynarank.factorize_(model, rank=2)
    assert {entry.name for entry in report.entries if entry.rank is None} == {"tokens", "positions", "head"}
    assert model(torch.zeros(2, 5, dtype=torch.int64)).shape == (2, 5, 11)


def test_it_exports_as_one_graph():
    model = GPT(11, **SMALL).eval()
    tokens = torch.randint(11, (3, 5))
    torch.testing.assert_close(torch.export.export(model, (tokens,)).module()(tokens), model(tokens))


def test_a_sequence_longer_than_the_context_is_refused():
    with pytest.raises(ValueError, match="at most context = 5 tokens, got 6"):
        GPT(11, **SMALL)(torch.zeros(2, 6, dtype=torch.int64))


def test_a_width_that_the_heads_do_not_share_is_refused():
    with pytest.raises(ValueError, match="width must be a multiple of heads = 4, got 130"):
        GPT(11, width=130)


@pytest.mark.parametrize("dropout", [-0.1, 1.0])
def test_a_dropout_that_is_no_probability_is_refused(dropout: float):
    with pytest.raises(ValueError, match="dropout must be at least 0 and below 1, got"):
        GPT(11, dropout=dropout)


@pytest.mark.parametrize("name", ["vocabulary", "layers", "heads", "width", "context", "mlp_ratio"])
def test_empty_sizes_are_refused(name: str):
    with pytest.raises(ValueError, match=f"{name}.* must be at least 1, got 0"):
        GPT(**{"vocabulary": 11, name: 0})
