"""All layers at once, when the stable ranks have settled: Cuttlefish's test."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import final

import torch
from torch import Tensor

from dynarank import linalg
from dynarank.switches.base import AbstractSwitch, State


@final
@dataclass(frozen=True)
class SettledStableRank(AbstractSwitch):
    """All layers are ready once the stable rank ``||W||_F^2 / sigma_1^2`` of every one of them has settled.

    At every look the stable rank enters an exponential moving average, a new value with weight
    ``2 / (smoothing + 1)``. A layer has settled, for good, when the mean of the last ``window`` absolute changes of
    that average is at most ``tolerance``. So that one layer does not hold up all others, the tolerance is
    ``relaxation`` times as large when two layers are left and twice that for the last one.

    The tolerance is in units of the stable rank, whatever the size of the layer, and a small learning rate settles
    everything. Rank policies that go with it are `ScaledStableRank`, as published, or any other.

    Args:
        every: Optimizer steps between looks; published: an epoch.
        tolerance: Largest mean change of the smoothed stable rank from look to look.
        window: Changes that the mean is taken over.
        smoothing: Looks that the average reaches back. No layer settles before as many have followed the first, nor
            before the window is full.
        relaxation: Factor of the tolerance when two layers are left.
        delay: Optimizer steps before the first look.

    Example:
        >>> switch, state = SettledStableRank(every=10, window=2, smoothing=3), {}
        >>> for step in (0, 10, 20, 30):
        ...     ready, state = switch.look(step, {"fc": torch.eye(4)}, state)
        ...     print(step, sorted(ready))
        0 []
        10 []
        20 []
        30 ['fc']

    Reference:
        Wang, Agarwal, U-chupala, Tanaka, Xing, Papailiopoulos, "Cuttlefish: low-rank model training without all the
        tuning", MLSys 2023, https://arxiv.org/abs/2305.02538. The defaults are those of the published code for
        CIFAR-10 (for ImageNet it takes a tolerance of 0.33, a window of 5 and other counts of layers left). It rounds
        each stable rank down to a whole number and takes central differences; here changes are from look to look.
    """

    every: int
    tolerance: float = 0.1
    window: int = 11
    smoothing: int = 15
    relaxation: float = 2.5
    delay: int = 0

    def __post_init__(self) -> None:
        if self.every < 1 or self.delay < 0:
            raise ValueError(
                f"SettledStableRank: every must be at least 1 and delay at least 0, got {self.every} and {self.delay}."
            )
        if not self.tolerance > 0:
            raise ValueError(f"SettledStableRank: tolerance must be above 0, got {self.tolerance}.")
        if self.window < 1 or self.smoothing < 1:
            raise ValueError(
                f"SettledStableRank: window and smoothing must be at least 1, got {self.window} and {self.smoothing}."
            )
        if not self.relaxation >= 1:
            raise ValueError(f"SettledStableRank: relaxation must be at least 1, got {self.relaxation}.")

    def looks(self, step: int) -> bool:
        return step >= self.delay and (step - self.delay) % self.every == 0

    def look(self, step: int, weights: Mapping[str, Tensor], state: State) -> tuple[frozenset[str], State]:
        settled = {name for name in weights if f"{name}.settled" in state and bool(state[f"{name}.settled"])}
        tolerance = self._tolerance(len(weights) - len(settled))
        remembered = {}
        for name, W in weights.items():
            averages = self._averages(W, state.get(f"{name}.averages"))
            if self._change(averages) <= tolerance:
                settled.add(name)
            remembered |= {f"{name}.averages": averages, f"{name}.settled": torch.tensor(name in settled)}
        return (frozenset(weights) if len(settled) == len(weights) else frozenset()), remembered

    def _tolerance(self, left: int) -> float:
        """Return the tolerance where ``left`` layers have not settled."""
        return self.tolerance * {2: self.relaxation, 1: 2 * self.relaxation}.get(left, 1.0)

    def _averages(self, W: Tensor, before: Tensor | None) -> Tensor:
        """Return the moving averages ``(looks,)`` up to now, the last of them only, oldest first."""
        sigma = linalg.svd(W)[1].double().cpu()
        stable = (sigma / sigma[0]).square().sum() if sigma[0] > 0 else sigma[0]
        if before is None:
            return stable.reshape(1)
        weight = 2 / (self.smoothing + 1)
        now = weight * stable + (1 - weight) * before[-1]
        return torch.cat([before, now.reshape(1)])[-max(self.smoothing, self.window) - 1 :]

    def _change(self, averages: Tensor) -> float:
        """Return the mean change over the window, or infinity where there have been too few looks."""
        if len(averages) <= max(self.smoothing, self.window):
            return float("inf")
        return float(averages[-self.window - 1 :].diff().abs().mean())
