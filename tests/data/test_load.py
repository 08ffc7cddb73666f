"""Loading by name."""

from pathlib import Path

import pytest
import torch

from dynarank.data import load, load_digits_data, planted_teacher


def test_a_name_reaches_its_loader_with_its_options():
    assert torch.equal(load("digits", split_seed=5).test_inputs, load_digits_data(split_seed=5).test_inputs)
    expected = planted_teacher(4, samples=8).splits.train_targets
    assert torch.equal(load("synthetic", samples=8).train_targets, expected)
    assert load("synthetic", rank=0, outputs=3, inputs=5).input_shape == (5,)


def test_mnist_gets_the_directory(tmp_path: Path):
    with pytest.raises(ValueError, match="load_mnist: directory"):
        load("mnist", directory=tmp_path)


def test_an_unknown_name_lists_the_known_ones():
    with pytest.raises(ValueError, match=r"unknown data set 'minst'. Available: digits, mnist, synthetic"):
        load("minst")


def test_an_option_of_another_loader_is_refused():
    with pytest.raises(TypeError, match="rank"):
        load("digits", rank=3)
