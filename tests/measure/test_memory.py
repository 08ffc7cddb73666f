"""Bytes stored and bytes alive, counted by hand."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from dynarank.layers.linear import LowRankLinear
from dynarank.measure import peak_memory, stored_bytes


def test_stored_bytes_are_parameters_and_persistent_buffers():
    net = nn.Sequential(nn.Linear(5, 7), nn.BatchNorm1d(7))
    net.register_buffer("scratch", torch.zeros(100), persistent=False)
    assert stored_bytes(net) == 4 * (35 + 7 + 4 * 7) + 8  # num_batches_tracked is an int64
    assert stored_bytes(LowRankLinear(20, 10, rank=3, dtype=torch.bfloat16)) == 2 * (3 * 30 + 10)
    assert stored_bytes(nn.Linear(5, 7, device="meta")) == 4 * 42


def test_shared_storage_counts_once():
    net = nn.ModuleList([nn.Linear(5, 7, bias=False) for _ in range(3)])
    net[1].weight = net[0].weight  # one parameter
    net[2].weight = nn.Parameter(net[0].weight.detach().mT)  # another that shares its memory
    assert stored_bytes(net) == 4 * 35


def test_a_part_of_a_storage_counts_as_a_part():
    whole = torch.zeros(9, 5)
    net = nn.ParameterList([nn.Parameter(whole[:2]), nn.Parameter(whole[2:5])])
    assert stored_bytes(net) == 4 * 25
    net.append(nn.Parameter(whole))
    assert stored_bytes(net) == 4 * 45


def test_peak_is_the_weights_and_two_neighbouring_activations():
    net = nn.Sequential(*(nn.Linear(n, m, bias=False) for n, m in ((5, 70), (70, 30), (30, 3))))
    # The hidden activations of widths 70 and 30 are alive together; after that the first one is free.
    assert peak_memory(net, torch.zeros(2, 5)) == stored_bytes(net) + 4 * 2 * (70 + 30)


def test_views_and_writing_in_place_take_nothing():
    net = nn.Sequential(nn.Linear(5, 12, bias=False), nn.ReLU(inplace=True), nn.Unflatten(1, (3, 4)), nn.Flatten())
    assert peak_memory(net, torch.zeros(2, 5)) == stored_bytes(net) + 4 * 2 * 12
    assert peak_memory(nn.Flatten(), torch.zeros(2, 5)) == 0
    assert peak_memory(nn.Identity(), torch.zeros(2, 5), forward=lambda model, x: x.relu_().mT.add_(1)) == 0


def test_what_the_forward_pass_keeps_stays_alive():
    def forward(model: nn.Module, x: Tensor) -> list[Tensor]:
        return [x + 1, x + 2, x + 3]

    assert peak_memory(nn.Identity(), torch.zeros(2, 5), forward=forward) == 3 * 40


def test_buffers_count_whether_they_persist_or_not():
    net = nn.Identity()
    net.register_buffer("scratch", torch.zeros(100), persistent=False)
    assert peak_memory(net, torch.zeros(2, 5)) == 400


def test_low_rank_saves_weights_but_adds_the_activation_in_rank_space():
    net = LowRankLinear(40, 30, rank=3, bias=False)
    assert peak_memory(net, torch.zeros(2, 40)) == 4 * (3 * 70 + 2 * (3 + 30))


def test_nothing_is_kept_for_a_backward_pass():
    net = nn.Sequential(*(part for _ in range(9) for part in (nn.Linear(9, 9, bias=False), nn.Sigmoid())))
    assert peak_memory(net, torch.zeros(4, 9)) == stored_bytes(net) + 2 * 4 * 4 * 9


def test_a_fused_transformer_layer_is_measured_as_it_runs():
    layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)
    assert peak_memory(layer, torch.zeros(3, 5, 8)) >= stored_bytes(layer) + 4 * 3 * 5 * 8


def test_the_model_is_left_as_it_was(attention: Any, state_of: Any):
    before = state_of(attention)
    peak_memory(attention, torch.zeros(2, 5, 6, dtype=torch.float64))
    with pytest.raises(RuntimeError):
        peak_memory(attention, torch.zeros(2, 5, 7, dtype=torch.float64))
    assert state_of(attention) == before
