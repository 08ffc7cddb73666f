"""A layer whose directions have stopped turning: the premise of OIALR, taken as a test."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import final

import torch
from torch import Tensor

from dynarank import linalg
from dynarank.switches.base import AbstractSwitch, State


@final
@dataclass(frozen=True)
class StableBasis(AbstractSwitch):
    """A layer is ready when ``S = tr(E_before^T E) / min(m, n)`` of its basis ``E = U V^T`` stays at a threshold.

    ``E`` is the orthogonal polar factor of ``W = U Sigma V^T``, which does not depend on the signs and rotations that
    an SVD leaves open. ``S`` is the mean cosine between its columns at two looks: 1 where no direction has moved, 0
    where they have nothing to do with each other.

    ``S`` says as much about the step size as about learning: it is near 1 between close looks, with a small learning
    rate and during its warm-up, and goes to 1 wherever the learning rate goes to 0. Choose ``every`` as long as
    several epochs and ``delay`` behind the warm-up. All directions count alike, so a layer whose weak directions are
    noise looks unstable although its strong ones rest; one that is exactly rank-deficient never gets beyond its rank
    over ``min(m, n)``. The state takes the memory of the weights once more.

    Args:
        every: Optimizer steps between looks.
        delay: Optimizer steps before the first look.
        threshold: Smallest ``S`` that counts as stable.
        patience: Looks in a row at which it must.

    Example:
        >>> switch, W = StableBasis(every=10), torch.eye(3)
        >>> ready, state = switch.look(0, {"fc": W}, switch.init())
        >>> switch.look(10, {"fc": 2 * W}, state)[0]
        frozenset({'fc'})

    Reference:
        Coquelin et al., "Harnessing orthogonality to train low-rank neural networks", 2024,
        https://arxiv.org/abs/2401.08505. There stability is the reason for the method, and the published loop goes by
        the step alone, as `AtStep` does; the threshold is that of an older layer of the published code.
    """

    every: int
    delay: int = 0
    threshold: float = 0.9
    patience: int = 1

    def __post_init__(self) -> None:
        if self.every < 1 or self.delay < 0:
            raise ValueError(
                f"StableBasis: every must be at least 1 and delay at least 0, got {self.every} and {self.delay}."
            )
        if not 0 < self.threshold < 1:
            raise ValueError(f"StableBasis: threshold must be between 0 and 1, got {self.threshold}.")
        if self.patience < 1:
            raise ValueError(f"StableBasis: patience must be at least 1, got {self.patience}.")

    def looks(self, step: int) -> bool:
        return step >= self.delay and (step - self.delay) % self.every == 0

    def look(self, step: int, weights: Mapping[str, Tensor], state: State) -> tuple[frozenset[str], State]:
        ready, remembered = set(), {}
        for name, W in weights.items():
            basis, stable = f"{name}.basis", f"{name}.stable"
            E = linalg.polar(W)  # (m, n)
            rests = basis in state and float((state[basis].to(E) * E).sum()) >= self.threshold * min(E.shape)
            looks = int(state[stable]) + 1 if rests else 0
            if looks >= self.patience:
                ready.add(name)
            remembered |= {basis: E, stable: torch.tensor(looks)}
        return frozenset(ready), remembered
