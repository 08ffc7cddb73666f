"""Torch's own transformers: weights that are read without a call, padding, and the fast path."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from dynarank.compress import compress_
from dynarank.layers.base import low_rank_layers
from dynarank.measure import flops


class Attention(nn.Module):
    """Torch's attention, which reads the weight of its output projection without calling it."""

    def __init__(self) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(16, 2, batch_first=True, dtype=torch.float64)
        self.fc = nn.Linear(16, 16, dtype=torch.float64)
        self.head = nn.Linear(16, 3, dtype=torch.float64)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.fc(self.attention(x, x, x, need_weights=False)[0]))


def test_an_output_projection_that_is_read_and_not_called_stays_as_it_is():
    model, data = Attention(), [torch.randn(3, 5, 16, dtype=torch.float64)]
    projection = model.attention.out_proj
    report = compress_(model, 0.9, calibration=data)
    assert model.attention.out_proj is projection
    assert {layer.name: layer.reason for layer in report.kept}["attention.out_proj"] == "the model does not call it"
    assert set(low_rank_layers(model)) == {"fc"}


@pytest.mark.parametrize("training", [True, False])
def test_without_data_an_output_projection_may_be_replaced_and_goes_on_working(training: bool):
    model, x = Attention().train(training), torch.randn(3, 5, 16, dtype=torch.float64)
    compress_(model, 0.75)
    assert "attention.out_proj" in set(low_rank_layers(model))
    weight = model.attention.out_proj.weight.detach().as_subclass(Tensor).clone()
    y = model(x)
    plain = Attention().train(training)
    plain.attention.load_state_dict(model.attention.state_dict() | {"out_proj.weight": weight}, strict=False)
    plain.fc, plain.head = model.fc, model.head
    torch.testing.assert_close(y, plain(x), atol=1e-12, rtol=1e-12)


def encoder(nested: bool) -> Any:
    layer = nn.TransformerEncoderLayer(16, 2, 40, batch_first=True)
    return nn.TransformerEncoder(layer, 2, enable_nested_tensor=nested)


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors:UserWarning")
@pytest.mark.parametrize("nested", [True, False])
def test_the_fast_path_is_no_damage_where_inputs_are_padded(nested: bool):
    model = nn.ModuleDict({"encoder": encoder(nested), "head": nn.Linear(16, 3)})
    with torch.no_grad():  # nothing is lost by its truncation
        model["encoder"].layers[1].linear1.weight.zero_()  # type: ignore[union-attr]
    mask = torch.zeros(4, 6, dtype=torch.bool)
    mask[:2, 3:] = True
    x = torch.randn(4, 6, 16)

    def forward(model: Any, batch: Tensor) -> Tensor:
        """With the outputs at padded positions, which the fast path writes as zeros."""
        return model["head"](model["encoder"](batch, src_key_padding_mask=mask))

    report = compress_(model, 0.8, calibration=[x], forward=forward)
    damages = {layer.name: layer.damage for layer in report.compressed}
    assert damages["encoder.layers.1.linear1"] < 1e-9
    assert flops(model, x, forward=forward) == report.flops_after
    assert bool(forward(model.eval(), x).isfinite().all())
