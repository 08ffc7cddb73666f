"""What a comparison says, in sentences that do not flatter."""

import math
from collections.abc import Mapping
from typing import Any

SLOWER = 1.1  # time per step, relative to the other network, from which it is worth a sentence


def noise(accuracy: float, samples: int) -> float:
    """Return the difference of two accuracies that chance alone exceeds in about one of twenty cases.

    Both networks are judged on the same number of samples, taken as independent: two standard errors.

    Example:
        >>> round(noise(0.97, 300), 3)
        0.028
    """
    return 2 * math.sqrt(2 * accuracy * (1 - accuracy) / samples)


def judge(own: Mapping[str, Any], other: Mapping[str, Any], *, samples: int) -> list[str]:
    """Return sentences on the low-rank network next to another: which is better, and whether that means anything.

    Args:
        own: Row of the low-rank network.
        other: Row of the other network.
        samples: Samples of the test part.

    Example:
        >>> judge({"test_accuracy": 0.97}, {"name": "dense", "test_accuracy": 0.98}, samples=300)
        ['The dense network is better than low rank by 1.00 points; on 300 test samples chance alone makes about 2.5.']
    """
    name = other["name"]
    by_accuracy = "test_accuracy" in own
    quality = _by_accuracy(own, other, samples) if by_accuracy else _by_loss(own, other)
    said = [quality]
    mine, theirs = own.get("ms_per_step", 0.0), other.get("ms_per_step", math.inf)
    if name == "dense" and mine > SLOWER * theirs:
        said.append(f"At this size a step of low-rank training takes {mine / theirs:.1f} times as long as a dense one.")
    return said


def _by_accuracy(own: Mapping[str, Any], other: Mapping[str, Any], samples: int) -> str:
    mine, theirs, name = own["test_accuracy"], other["test_accuracy"], other["name"]
    if mine == theirs:
        return f"The {name} network and low rank are equally good."
    winner, loser = ("Low rank", f"the {name} network") if mine > theirs else (f"The {name} network", "low rank")
    limit = 100 * noise((mine + theirs) / 2, samples)
    points = 100 * abs(mine - theirs)
    chance = f"on {samples:,} test samples chance alone makes about {limit:.{1 if limit >= 1 else 2}f}"
    return f"{winner} is better than {loser} by {points:.2f} points; {chance}."


def _by_loss(own: Mapping[str, Any], other: Mapping[str, Any]) -> str:
    mine, theirs, name = own["test_loss"], other["test_loss"], other["name"]
    winner, loser = ("Low rank", f"the {name} network") if mine < theirs else (f"The {name} network", "low rank")
    return f"{winner} is better than {loser}: a test loss of {min(mine, theirs):.5g} against {max(mine, theirs):.5g}."
