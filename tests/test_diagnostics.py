"""The summary of a model says what its low-rank layers are and what trains them."""

import json

import pytest
import torch
from torch import nn

from dynarank.diagnostics import summary
from dynarank.layers.conv2d import LowRankConv2d
from dynarank.layers.linear import LowRankLinear
from dynarank.optim.low_rank_optimizer import LowRankOptimizer


def network() -> nn.Sequential:
    return nn.Sequential(
        LowRankConv2d(2, 6, 3, rank=3), nn.Flatten(), LowRankLinear(54, 20, rank=4, rank_multiple=8), nn.Linear(20, 3)
    )


def test_it_lists_shapes_ranks_and_sizes():
    model = network()
    found = summary(model)
    assert [(e.name, e.shape, e.rank, e.capacity, e.form, e.parameters) for e in found.layers] == [
        ("0", (6, 18), 3, 3, "pair", 72),
        ("2", (20, 54), 4, 8, "pair", 296),
    ]
    assert found.other_parameters == 6 + 20 + 63 and found.notes == () and found.layers[0].driver == "-"
    assert "LowRankConv2d" in str(found) and "2 low-rank layers hold 368 numbers" in str(found)
    json.dumps(found.as_dict())


def test_it_names_the_optimizer_its_integrator_and_its_policy():
    optimizer = LowRankOptimizer(network(), integrator="parallel_bug", rank_policy="relative_tail")
    text = str(summary(optimizer))
    assert text.count("LowRankOptimizer: ParallelBUG") == 2
    assert "After step 0 ranks follow RelativeTail; AdamW trains all the rest." in text
    optimizer.freeze_ranks()
    assert "ranks are frozen" in str(summary(optimizer.model, optimizer))


def test_plain_training_is_called_the_baseline():
    model = network()
    text = str(summary(model, torch.optim.SGD(model.parameters(), lr=0.1)))
    assert text.count("SGD: plain U V^T\n") == 2 and "the baseline" in text


def test_what_nothing_trains_is_said():
    model = network()
    optimizer = LowRankOptimizer(model)
    model.append(LowRankLinear(3, 3, rank=1))
    model[0].requires_grad_(False)
    text = str(summary(optimizer))
    assert "nothing: frozen" in text and "4: not in the optimizer, so nothing trains them" in text
    assert "nothing: not in SGD" in str(summary(model, torch.optim.SGD(model[3].parameters(), lr=0.1)))


def test_a_layer_in_the_core_form_says_so():
    model = network()
    optimizer = LowRankOptimizer(model, integrator="augmented_bug")
    model(torch.ones(2, 2, 5, 5)).square().sum().backward()
    optimizer.step()
    assert summary(optimizer).layers[0].form == "core" and "core" in str(summary(optimizer))


def test_a_model_without_low_rank_layers_gives_an_empty_summary():
    assert "0 low-rank layers hold 0 numbers; 6 others." in str(summary(nn.Linear(2, 2)))


def test_an_optimizer_alone_is_refused_unless_it_knows_its_model():
    with pytest.raises(TypeError, match=r"Call summary\(model, optimizer\)"):
        summary(torch.optim.SGD([torch.ones(1)]))


def test_cores_are_told_from_the_baseline():
    first = LowRankLinear(20, 10, rank=3)
    first.set_factors(first.factors(), form="core")
    model = nn.Sequential(first, nn.ReLU(), LowRankLinear(10, 10, rank=2))
    text = str(summary(model, torch.optim.SGD(model.parameters(), lr=0.1)))
    assert text.count("SGD: core\n") == 1 and text.count("SGD: plain U V^T\n") == 1
    assert "SGD trains the cores between bases that stay." in text
