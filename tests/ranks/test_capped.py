"""No layer is kept above the cap; below it nothing changes."""

from typing import Any

import pytest
import torch

from dynarank.ranks.base import LayerSpectrum, PlanContext
from dynarank.ranks.capped import Capped
from dynarank.ranks.relative_tail import RelativeTail

CONTEXT = PlanContext(0, 0, 0)
LAYERS = [
    LayerSpectrum("wide", 0.9 ** torch.arange(40, dtype=torch.float64), (48, 64)),
    LayerSpectrum("narrow", 0.5 ** torch.arange(6, dtype=torch.float64), (6, 25)),
    LayerSpectrum("thin", torch.ones(1, dtype=torch.float64), (1, 9)),
]


@pytest.mark.parametrize("largest", [1, 3, 8, 99, 0.05, 0.25, 0.5, 1.0])
@pytest.mark.parametrize("growth", [0.0, 0.5, 1.0])
def test_the_rank_is_the_smaller_of_the_wish_and_the_cap(largest: float, growth: float):
    inner = RelativeTail(0.1, growth=growth)
    pairs = zip(Capped(inner, largest).plan(LAYERS, CONTEXT), inner.plan(LAYERS, CONTEXT), LAYERS, strict=True)
    for found, wanted, layer in pairs:
        cap = largest if isinstance(largest, int) else max(1, int(largest * min(layer.shape)))
        assert found.rank == min(wanted.rank, cap)
        assert found == wanted or f"at most {cap}" in found.reason
        assert found.candidates <= wanted.candidates and (found.candidates > 0) == (wanted.candidates > 0)


def test_candidates_keep_their_proportion_to_the_rank():
    found = Capped(RelativeTail(0.1, growth=0.5), 6).plan(LAYERS[:1], CONTEXT)[0]
    assert (found.rank, found.candidates) == (6, 3)


def test_a_whole_number_and_a_fraction_are_told_apart():
    assert Capped(largest=1).cap(48) == 1 and Capped(largest=1.0).cap(48) == 48
    assert Capped(largest=0.29).cap(100) == 29, "rounding does not take one away"


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"policy": "budget"}, TypeError, "Capped: policy must be an instance of a rank policy, got 'budget'"),
        ({"largest": 0}, ValueError, "Capped: largest must be a whole number of at least 1 or a fraction .* got 0"),
        ({"largest": 1.5}, ValueError, "Capped: largest must be .* got 1.5"),
        ({"largest": float("nan")}, ValueError, "Capped: largest must be .* got nan"),
    ],
)
def test_what_is_out_of_range_is_named(options: dict[str, Any], error: type[Exception], message: str):
    with pytest.raises(error, match=message):
        Capped(**options)
