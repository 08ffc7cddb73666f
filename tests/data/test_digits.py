"""Laws of the digits that scikit-learn ships."""

import sys

import pytest
import torch

from dynarank.data.digits import load_digits_data


def test_sizes_and_range():
    splits = load_digits_data()
    assert [len(splits.part(part)[0]) for part in ("train", "validation", "test")] == [1197, 300, 300]
    assert splits.input_shape == (1, 8, 8)
    assert splits.train_inputs.dtype == torch.float32
    assert (splits.train_inputs.min(), splits.train_inputs.max()) == (0, 1)
    assert splits.train_targets.unique().tolist() == list(range(10))


def test_the_split_follows_its_seed_and_not_the_global_generator():
    before = torch.get_rng_state()
    first = load_digits_data()
    assert torch.equal(before, torch.get_rng_state())
    torch.manual_seed(1)
    assert torch.equal(first.test_inputs, load_digits_data().test_inputs)
    assert not torch.equal(first.test_inputs, load_digits_data(split_seed=1).test_inputs)


def test_the_parts_hold_every_image_once():
    def rows(seed: int) -> list[list[float]]:
        splits = load_digits_data(split_seed=seed)
        images = torch.cat([splits.part(part)[0] for part in ("train", "validation", "test")])
        return sorted(images.flatten(1).tolist())

    assert rows(0) == rows(1)


def test_a_missing_extra_gives_one_line(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(sys.modules, "sklearn.datasets", None)
    with pytest.raises(ImportError, match=r'pip install "dynarank\[data\]"'):
        load_digits_data()
