"""Laws of the planted teacher: exact rank, unit signal, known noise."""

import pytest
import torch

from dynarank.data.synthetic import planted_teacher, planted_weight

SHAPES = [(7, 5), (5, 7), (48, 64), (1, 1)]  # outputs, inputs


@pytest.mark.parametrize(
    ("outputs", "inputs", "rank"), [(m, n, r) for m, n in SHAPES for r in sorted({0, 1, min(m, n) // 2, min(m, n)})]
)
def test_the_planted_rank_is_exact(outputs: int, inputs: int, rank: int):
    weight = planted_teacher(rank, inputs=inputs, outputs=outputs, samples=4).weight
    sigma = torch.linalg.svdvals(weight.double())
    assert weight.shape == (outputs, inputs)
    assert weight.dtype == torch.float32
    assert (sigma[rank:] < 1e-6 * outputs**0.5).all()  # what rounding to float32 leaves
    # Equal singular values: the squared norm of W is the number of outputs, shared by rank directions.
    expected = torch.full((rank,), (outputs / max(rank, 1)) ** 0.5, dtype=torch.float64)
    torch.testing.assert_close(sigma[:rank], expected, rtol=0.02, atol=0)


@pytest.mark.parametrize("rank", [1, 2, 5])
def test_every_output_has_unit_signal_variance(rank: int):
    weight = planted_weight(rank, inputs=5, outputs=7, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(weight.norm(dim=1), torch.ones(7, dtype=torch.float64), atol=1e-12, rtol=0)


@pytest.mark.parametrize("rank", [0, 3])
@pytest.mark.parametrize("noise", [0.0, 0.1, 2.0])
def test_targets_are_signal_plus_noise_of_the_stated_size(rank: int, noise: float):
    teacher = planted_teacher(rank, inputs=7, outputs=5, samples=4000, noise=noise)
    splits = teacher.splits
    for inputs, targets in (splits.part(part) for part in ("train", "validation", "test")):
        residual = targets - inputs @ teacher.weight.T
        torch.testing.assert_close(residual.std().item(), noise, rtol=0.05, atol=0)
        torch.testing.assert_close(inputs.std().item(), 1.0, rtol=0.05, atol=0)


def test_parts_share_the_teacher_and_no_sample():
    splits = planted_teacher(2, inputs=7, outputs=5, samples=10).splits
    assert (len(splits.train_inputs), len(splits.validation_inputs), len(splits.test_inputs)) == (10, 3, 3)
    assert (splits.classes, splits.outputs, splits.input_shape) == (None, 5, (7,))
    inputs = torch.cat([splits.train_inputs, splits.validation_inputs, splits.test_inputs])
    assert len(inputs.unique(dim=0)) == 16


def test_the_seed_decides_and_the_global_generator_does_not():
    before = torch.get_rng_state()
    first = planted_teacher(2, samples=8)
    assert torch.equal(before, torch.get_rng_state())
    again, other = planted_teacher(2, samples=8), planted_teacher(2, samples=8, seed=1)
    assert torch.equal(first.splits.train_targets, again.splits.train_targets)
    assert not torch.equal(first.weight, other.weight)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"rank": 6, "inputs": 7, "outputs": 5}, r"rank must be between 0 and min\(inputs, outputs\) = 5, got 6"),
        ({"rank": -1}, "rank must be between 0 and .* got -1"),
        ({"rank": 1, "samples": 0}, "must be at least 1, got 64, 48 and 0"),
        ({"rank": 1, "noise": -0.1}, "noise is a standard deviation and must be at least 0, got -0.1"),
    ],
)
def test_impossible_options_are_refused(options: dict, message: str):
    with pytest.raises(ValueError, match=message):
        planted_teacher(**options)
