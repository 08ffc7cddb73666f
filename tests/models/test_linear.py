"""Laws of the single matrix."""

import pytest
import torch

from dynarank.models.linear import LinearNetwork


def test_forward_is_the_plain_product():
    model = LinearNetwork(6, 5).double()
    inputs = torch.randn(4, 2, 3, dtype=torch.float64)
    torch.testing.assert_close(model(inputs), inputs.reshape(4, 6) @ model.fc.weight.T)
    assert [name for name, _ in model.named_parameters()] == ["fc.weight"]


def test_empty_sizes_are_refused():
    with pytest.raises(ValueError, match="inputs and outputs must be at least 1, got 0 and 5"):
        LinearNetwork(0, 5)
