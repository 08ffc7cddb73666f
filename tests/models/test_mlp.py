"""Laws of the MLP: the count is the formula, narrower ones never exceed the size asked for."""

import pytest
import torch

from dynarank.models.mlp import MLP, mlp_parameters


def count(model: torch.nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters())


def test_forward_is_the_plain_formula():
    model = MLP(6, [5, 7], 3).double()
    inputs = torch.randn(4, 1, 2, 3, dtype=torch.float64)
    hidden = inputs.flatten(1)
    for layer in (model.get_submodule("fc1"), model.get_submodule("fc2")):
        hidden = torch.relu(hidden @ layer.weight.T + layer.bias)
    torch.testing.assert_close(model(inputs), hidden @ model.head.weight.T + model.head.bias)


@pytest.mark.parametrize("hidden", [(1,), (5, 7), (500, 500, 500, 500)])
def test_the_formula_counts_every_parameter(hidden: tuple[int, ...]):
    assert mlp_parameters(784, hidden, 10) == count(MLP(784, hidden, 10))


@pytest.mark.parametrize("hidden", [(500,) * 4, (300, 100), (64,)])
@pytest.mark.parametrize("share", [0.03, 0.05, 0.1, 0.33, 0.9])
def test_narrower_never_exceeds_and_comes_close(hidden: tuple[int, ...], share: float):
    model = MLP(784, hidden, 10)
    parameters = int(share * count(model))
    narrower = model.narrower(parameters)
    assert len(narrower.hidden) == len(hidden)
    assert all(narrow <= wide for narrow, wide in zip(narrower.hidden, hidden, strict=True))
    # One more unit in the first layer is the largest step, and it would not fit.
    step = 785 + (narrower.hidden[1] if len(hidden) > 1 else 10)
    assert parameters - step < count(narrower) <= parameters


def test_narrower_scales_all_widths_by_one_factor():
    narrower = MLP(784, (300, 100), 10).narrower(60_000)
    factor = narrower.hidden[0] / 300
    assert abs(narrower.hidden[1] - factor * 100) <= 1.5


def test_narrower_is_the_model_itself_at_its_own_count_and_beyond():
    model = MLP(7, [5, 3], 2)
    assert model.narrower(count(model)).hidden == model.narrower(10**9).hidden == (5, 3)


def test_narrower_names_the_smallest_size():
    smallest = count(MLP(7, [1, 1], 2))
    assert MLP(7, [5, 3], 2).narrower(smallest).hidden == (1, 1)
    with pytest.raises(ValueError, match=f"parameters must be at least {smallest}, got {smallest - 1}"):
        MLP(7, [5, 3], 2).narrower(smallest - 1)


@pytest.mark.parametrize("sizes", [(0, [5], 2), (7, [], 2), (7, [5, 0], 2), (7, [5], 0)])
def test_empty_sizes_are_refused(sizes: tuple):
    with pytest.raises(ValueError, match="must be at least 1, got"):
        MLP(*sizes)


@pytest.mark.parametrize("width", [500, 784, 2048, 5120])
@pytest.mark.parametrize("share", [0.02, 0.1, 0.5])
def test_narrower_covers_the_widths_of_the_literature(width: int, share: float):
    with torch.device("meta"):
        model = MLP(784, (width,) * 4, 10)
        dense = 785 * width + 3 * (width + 1) * width + (width + 1) * 10
        assert count(model) == mlp_parameters(784, (width,) * 4, 10) == dense
        narrower = model.narrower(int(share * dense))
    assert 0.97 * share * dense < count(narrower) <= share * dense
    assert max(narrower.hidden) - min(narrower.hidden) <= 1
