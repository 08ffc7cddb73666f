"""All layers are ready from a step on."""

import pytest
import torch

from dynarank.switches.at_step import AtStep


@pytest.mark.parametrize("delay", [0, 1, 7])
def test_all_layers_are_ready_from_the_delay_on(delay: int):
    switch, weights = AtStep(delay), {"one": torch.ones(2, 3), "two": torch.zeros(1, 1)}
    for step in range(12):
        assert switch.looks(step) == (step >= delay)
        assert switch.look(step, weights, {}) == (frozenset(weights) if step >= delay else frozenset(), {})


def test_a_delay_below_zero_is_named():
    with pytest.raises(ValueError, match="AtStep: delay must be at least 0, got -1"):
        AtStep(-1)
