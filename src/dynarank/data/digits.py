"""The 8 x 8 digits that scikit-learn ships: a real data set that needs no network."""

import torch

from dynarank.data.splits import DataSplits
from dynarank.errors import missing_extra

HELD_OUT = 300  # samples each of the validation and the test part


def load_digits_data(*, split_seed: int = 1234) -> DataSplits:
    """Load scikit-learn's 1,797 handwritten digits with pixels in [0, 1], split at random into 1,197 / 300 / 300.

    The split is not stratified.

    Args:
        split_seed: Seed of the permutation behind the split. The global generator is neither used nor changed.

    Shape:
        - inputs: ``(1197, 1, 8, 8)``, ``(300, 1, 8, 8)``, ``(300, 1, 8, 8)``, float32.
        - targets: ``(N,)``, int64.

    Raises:
        ImportError: If scikit-learn is not installed.

    Example:
        >>> load_digits_data()
        DataSplits(digits: train (1197, 1, 8, 8), validation (300, 1, 8, 8), test (300, 1, 8, 8), classes 10)

    Reference:
        E. Alpaydin, C. Kaynak, Optical Recognition of Handwritten Digits, UCI Machine Learning Repository, 1998,
        https://doi.org/10.24432/C50P49. scikit-learn ships its test part, which we split anew.
    """
    try:
        from sklearn.datasets import load_digits
    except ImportError as error:
        raise missing_extra("scikit-learn", "data") from error
    pixels, labels = load_digits(return_X_y=True)
    inputs = torch.as_tensor(pixels, dtype=torch.float32).reshape(-1, 1, 8, 8) / 16  # (1797, 1, 8, 8)
    targets = torch.as_tensor(labels, dtype=torch.int64)  # (1797,)
    order = torch.randperm(len(inputs), generator=torch.Generator().manual_seed(split_seed))
    train, validation, test = order.split([len(inputs) - 2 * HELD_OUT, HELD_OUT, HELD_OUT])
    return DataSplits(
        "digits",
        inputs[train],
        targets[train],
        inputs[validation],
        targets[validation],
        inputs[test],
        targets[test],
        classes=10,
    )
