"""All layers are ready at once when every stable rank has settled, against the test written out."""

from typing import Any

import pytest
import torch
from torch import Tensor

from dynarank.switches.settled_stable_rank import SettledStableRank


def weight_of(stable: float, shape: tuple[int, int] = (9, 7)) -> Tensor:
    """Return a weight with a given stable rank, in odd bases: one direction of 1, the rest equal."""
    m, n = shape
    generator = torch.Generator().manual_seed(1)
    U, V = (torch.linalg.qr(torch.randn(k, k, generator=generator, dtype=torch.float64))[0] for k in (m, n))
    sigma = torch.full((min(m, n),), ((stable - 1) / (min(m, n) - 1)) ** 0.5, dtype=torch.float64)
    sigma[0] = 1
    return 3.7 * U[:, : min(m, n)] @ torch.diag(sigma) @ V[:, : min(m, n)].T


def settles_at(paths: list[list[float]], tolerance: float, window: int, smoothing: int, relaxation: float) -> int:
    """Return the first look at which every layer has settled, from the stable ranks themselves."""
    weight, settled = 2 / (smoothing + 1), set()
    averages = [[path[0]] for path in paths]
    for look in range(len(paths[0])):
        allowed = tolerance * {2: relaxation, 1: 2 * relaxation}.get(len(paths) - len(settled), 1)
        for layer, path in enumerate(paths):
            if look:
                averages[layer].append(weight * path[look] + (1 - weight) * averages[layer][-1])
            changes = [abs(b - a) for a, b in zip(averages[layer], averages[layer][1:], strict=False)]
            if look >= max(smoothing, window) and sum(changes[-window:]) / window <= allowed:
                settled.add(layer)
        if len(settled) == len(paths):
            return look
    return -1


def look_by_look(switch: SettledStableRank, paths: list[list[float]], shapes: list[tuple[int, int]]) -> list[int]:
    """Return how many layers are ready at every look."""
    state, found = switch.init(), []
    for look in range(len(paths[0])):
        weights = {
            f"fc{layer}": weight_of(path[look], shape)
            for layer, (path, shape) in enumerate(zip(paths, shapes, strict=True))
        }
        ready, state = switch.look(look * switch.every, weights, state)
        found.append(len(ready))
    return found


def decay(rate: float, looks: int = 40, top: float = 6.0) -> list[float]:
    return [2 + (top - 2) * rate**look for look in range(looks)]


@pytest.mark.parametrize("rates", [[0.5], [0.95], [0.8, 0.9], [0.5, 0.9, 0.95], [0.7, 0.8, 0.9, 0.97]])
@pytest.mark.parametrize(
    ("tolerance", "window", "smoothing", "relaxation"),
    [(0.1, 11, 15, 2.5), (0.02, 5, 6, 2.5), (0.02, 5, 6, 1.0), (0.05, 8, 3, 2.0), (0.1, 1, 1, 1.0)],
)
def test_all_layers_are_ready_when_the_last_has_settled(
    rates: list[float], tolerance: float, window: int, smoothing: int, relaxation: float
):
    paths, shapes = [decay(rate) for rate in rates], [(9, 7), (7, 9), (8, 8), (30, 7)][: len(rates)]
    switch = SettledStableRank(5, tolerance, window, smoothing, relaxation)
    found = look_by_look(switch, paths, shapes)
    expected = settles_at(paths, tolerance, window, smoothing, relaxation)
    first = found.index(len(rates)) if len(rates) in found else -1
    assert first == expected and set(found) <= {0, len(rates)}
    assert found[first:] == [len(rates)] * len(found[first:]) or first == -1, "what has settled stays so"


def test_the_cases_above_settle_at_different_looks():
    looks = {settles_at([decay(rate)] * 3, 0.02, 5, 6, 1.0) for rate in (0.5, 0.8, 0.9, 0.95)}
    assert len(looks) == 4


def test_the_last_layers_are_judged_less_severely():
    paths = [decay(0.5), decay(0.5), decay(0.97)]
    strict, relaxed = (
        look_by_look(SettledStableRank(1, 0.03, 5, 6, relaxation), paths, [(9, 7)] * 3) for relaxation in (1.0, 2.5)
    )
    assert relaxed.index(3) < (strict.index(3) if 3 in strict else 99)


def test_a_layer_that_moves_again_has_settled_for_good():
    still, moving = [3.0] * 30, [3.0] * 8 + [3 + 0.4 * (look % 2) for look in range(22)]
    slow = decay(0.9, 30)
    switch = SettledStableRank(1, 0.05, 3, 4, 1.0)
    found = look_by_look(switch, [still, moving, slow], [(9, 7)] * 3)
    assert found.index(3) == settles_at([still, moving, slow], 0.05, 3, 4, 1.0) > 8


def test_nothing_is_ready_before_the_smoothing_has_passed():
    found = look_by_look(SettledStableRank(1), [[3.0] * 30], [(9, 7)])
    assert found == [0] * 15 + [1] * 15


def test_the_scale_of_the_weight_does_not_matter():
    switch, states = SettledStableRank(1, window=2, smoothing=2), ({}, {})
    for look in range(6):
        W = weight_of(2 + 0.5**look)
        (one, first), (other, second) = (
            switch.look(look, {"fc": c * W}, s) for c, s in zip((1, 1e6), states, strict=True)
        )
        torch.testing.assert_close(first["fc.averages"], second["fc.averages"], rtol=1e-12, atol=0)
        assert one == other
        states = first, second


@pytest.mark.parametrize(("every", "delay"), [(1, 0), (4, 0), (4, 10)])
def test_it_looks_at_equal_distances_after_the_delay(every: int, delay: int):
    switch = SettledStableRank(every, delay=delay)
    assert [step for step in range(50) if switch.looks(step)] == list(range(delay, 50, every))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"every": 0}, "SettledStableRank: every must be at least 1 and delay at least 0, got 0 and 0"),
        ({"every": 5, "delay": -2}, "SettledStableRank: every must be .* got 5 and -2"),
        ({"every": 5, "tolerance": 0.0}, "SettledStableRank: tolerance must be above 0, got 0.0"),
        ({"every": 5, "window": 0}, "SettledStableRank: window and smoothing must be at least 1, got 0 and 15"),
        ({"every": 5, "smoothing": 0}, "SettledStableRank: window and smoothing must be at least 1, got 11 and 0"),
        ({"every": 5, "relaxation": 0.5}, "SettledStableRank: relaxation must be at least 1, got 0.5"),
    ],
)
def test_what_is_out_of_range_is_named(options: dict[str, Any], message: str):
    with pytest.raises(ValueError, match=message):
        SettledStableRank(**options)
