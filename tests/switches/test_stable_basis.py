"""A layer is ready when the polar factor of its weight rests, against a plain SVD."""

from typing import Any

import pytest
import torch
from torch import Tensor

from dynarank.switches.stable_basis import StableBasis

SHAPES = [(7, 5), (5, 7), (6, 6), (1, 4), (4, 1)]


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def stability(before: Tensor, W: Tensor) -> float:
    """The mean cosine of the columns of the two factors, both made tall: as published."""
    factors = []
    for matrix in (before, W):
        U, _, Vh = torch.linalg.svd(matrix if matrix.shape[0] >= matrix.shape[1] else matrix.T, full_matrices=False)
        factors.append(U @ Vh)
    return float(torch.nn.functional.cosine_similarity(*factors, dim=0).mean())


def ready_at(switch: StableBasis, path: list[Tensor]) -> list[bool]:
    state, found = switch.init(), []
    for look, W in enumerate(path):
        ready, state = switch.look(look * switch.every, {"fc": W}, state)
        found.append(ready == {"fc"})
    return found


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("size", [0.02, 0.2, 0.6, 2.0])
def test_the_measure_is_the_mean_cosine_of_the_columns(shape: tuple[int, int], size: float):
    path = [draw(*shape), draw(*shape) + size * draw(*shape, seed=1)]
    S = stability(*path)
    for threshold in (S - 1e-6, S + 1e-6):
        if 0 < threshold < 1:
            assert ready_at(StableBasis(every=3, threshold=threshold), path) == [False, threshold < S]


@pytest.mark.parametrize("shape", SHAPES)
def test_singular_values_alone_do_not_matter(shape: tuple[int, int]):
    U, sigma, Vh = torch.linalg.svd(draw(*shape), full_matrices=False)
    path = [U @ torch.diag(s) @ Vh for s in (sigma, 3 * sigma, sigma**0.1, sigma.flip(0))]
    assert ready_at(StableBasis(every=1, threshold=1 - 1e-9), path) == [False, True, True, True]


def test_signs_and_rotations_among_equal_singular_values_do_not_matter():
    V = torch.linalg.qr(draw(5, 5))[0]
    path = [torch.eye(5).double(), V @ V.T, -V @ -V.T]
    assert ready_at(StableBasis(every=1, threshold=1 - 1e-9), path) == [False, True, True]


def test_an_unrelated_weight_is_not_stable():
    path = [draw(40, 30, seed=seed) for seed in range(6)]
    assert ready_at(StableBasis(every=1, threshold=0.3), path) == [False] * 6


@pytest.mark.parametrize("patience", [1, 2, 3])
def test_it_takes_as_many_looks_in_a_row_as_asked(patience: int):
    one, other = draw(6, 4), draw(6, 4, seed=1)
    still = [False, True, True, False, True, True, True, True]
    path = [one, one, one, other, other, other, other, other]
    counts = [0]
    for rests in still[1:]:
        counts.append(counts[-1] + 1 if rests else 0)
    assert ready_at(StableBasis(every=1, patience=patience), path) == [count >= patience for count in counts]


def test_layers_decide_alone():
    switch = StableBasis(every=1)
    _, state = switch.look(0, {"still": draw(5, 5), "moving": draw(5, 5)}, {})
    assert switch.look(1, {"still": draw(5, 5), "moving": draw(5, 5, seed=1)}, state)[0] == {"still"}


def test_a_rank_deficient_weight_never_gets_beyond_its_share():
    W = draw(6, 2) @ draw(2, 4, seed=1)
    assert ready_at(StableBasis(every=1, threshold=0.499), [W, W]) == [False, True]
    assert ready_at(StableBasis(every=1, threshold=0.501), [W, W]) == [False, False]


@pytest.mark.parametrize(("every", "delay"), [(1, 0), (4, 0), (4, 10)])
def test_it_looks_at_equal_distances_after_the_delay(every: int, delay: int):
    switch = StableBasis(every, delay=delay)
    assert [step for step in range(50) if switch.looks(step)] == list(range(delay, 50, every))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"every": 0}, "StableBasis: every must be at least 1 and delay at least 0, got 0 and 0"),
        ({"every": 5, "delay": -2}, "StableBasis: every must be .* got 5 and -2"),
        ({"every": 5, "threshold": 1.0}, "StableBasis: threshold must be between 0 and 1, got 1.0"),
        ({"every": 5, "threshold": float("nan")}, "StableBasis: threshold must be between 0 and 1, got nan"),
        ({"every": 5, "patience": 0}, "StableBasis: patience must be at least 1, got 0"),
    ],
)
def test_what_is_out_of_range_is_named(options: dict[str, Any], message: str):
    with pytest.raises(ValueError, match=message):
        StableBasis(**options)
