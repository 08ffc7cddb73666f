"""Laws of DataSplits."""

import pytest
import torch

from dynarank.data.splits import DataSplits


def make_splits(classes: int | None = 3, **changes: torch.Tensor) -> DataSplits:
    tensors = {
        "train_inputs": torch.randn(7, 2, 5),
        "train_targets": torch.randint(3, (7,)) if classes else torch.randn(7, 4),
        "validation_inputs": torch.randn(0, 2, 5),
        "validation_targets": torch.randint(3, (0,)) if classes else torch.randn(0, 4),
        "test_inputs": torch.randn(3, 2, 5),
        "test_targets": torch.randint(3, (3,)) if classes else torch.randn(3, 4),
    }
    return DataSplits("toy", **{**tensors, **changes}, classes=classes)


def test_shape_and_outputs_are_read_from_the_tensors():
    assert make_splits().input_shape == (2, 5)
    assert make_splits().outputs == 3
    assert make_splits(classes=None).outputs == 4


def test_to_moves_every_tensor_and_keeps_the_original():
    splits = make_splits()
    moved = splits.to("meta")
    for part in ("train", "validation", "test"):
        assert all(tensor.device.type == "meta" for tensor in moved.part(part))
        assert all(tensor.device.type == "cpu" for tensor in splits.part(part))
    assert (moved.name, moved.classes) == (splits.name, splits.classes)


def test_an_unknown_part_is_refused_by_name():
    with pytest.raises(ValueError, match=r"toy: part must be one of train, validation, test, got 'tests'"):
        make_splits().part("tests")


def test_lengths_must_agree():
    with pytest.raises(ValueError, match="toy: test has 4 inputs but 3 targets"):
        make_splits(test_inputs=torch.randn(4, 2, 5))


def test_sample_shapes_must_agree():
    with pytest.raises(ValueError, match=r"toy: test inputs must have sample shape \(2, 5\), got \(5, 2\)"):
        make_splits(test_inputs=torch.randn(3, 5, 2))


def test_a_single_class_is_refused():
    with pytest.raises(ValueError, match="classes must be at least 2, or None for regression, got 1"):
        make_splits(classes=1)
