"""What a comparison says, in sentences that do not flatter."""

import math
from collections.abc import Mapping
from typing import Any


def noise(accuracy: float, samples: int) -> float:
    """Return the difference of two accuracies that chance alone exceeds in about one of twenty cases.

    Both networks are judged on the same number of samples, taken as independent: two standard errors.

    Example:
        >>> round(noise(0.97, 300), 3)
        0.028
    """
    return 2 * math.sqrt(2 * accuracy * (1 - accuracy) / samples)


def against(own: Mapping[str, Any], other: Mapping[str, Any], *, samples: int, floor: float | None = None) -> str:
    """Return a sentence on the low-rank network against another.

    Args:
        own: Row of the low-rank network.
        other: Row of the other network.
        samples: Samples of the test part.
        floor: Loss that no network can fall below on average, for regression: the noise of the targets.

    Example:
        >>> against({"test_accuracy": 0.97}, {"name": "dense", "test_accuracy": 0.98}, samples=300)
        'The dense network is better by 1.00 points, which 300 test samples do not tell from chance (about 2.5).'
    """
    if "test_accuracy" in own:
        return _by_accuracy(own["test_accuracy"], other["test_accuracy"], str(other["name"]), samples)
    return _by_loss(own["test_loss"], other["test_loss"], str(other["name"]), floor or 0.0)


def _by_accuracy(own: float, other: float, name: str, samples: int) -> str:
    difference, limit = abs(own - other), noise((own + other) / 2, samples)
    if difference == 0:
        return f"The {name} network is exactly as good."
    winner = f"The {name} network" if other > own else f"Low rank beats the {name} network: it"
    told = (
        f"more than chance explains on {samples:,} test samples (about {100 * limit:.1f})"
        if difference > limit
        else f"which {samples:,} test samples do not tell from chance (about {100 * limit:.1f})"
    )
    return f"{winner} is better by {100 * difference:.2f} points, {told}."


def _by_loss(own: float, other: float, name: str, floor: float) -> str:
    mine, theirs = own - floor, other - floor
    above = f" above the noise of the targets, {floor:.4g}" if floor else ""
    if theirs < mine:
        return f"The {name} network is better: its test loss is {other:.5g} against {own:.5g}{above and f' ({above.strip()})'}."
    return f"Low rank beats the {name} network: its test loss is {own:.5g} against {other:.5g}."
