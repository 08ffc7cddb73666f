"""When things happen in a run, counted in optimizer steps."""

from dataclasses import dataclass
from typing import final

from dynarank.experiments.config import TrainConfig


@final
@dataclass(frozen=True)
class Moments:
    """The moments of a run.

    Args:
        steps: Steps of the whole run.
        per_epoch: Steps of an epoch.
        offset: Steps before another optimizer takes over.
        freeze: Step of the last rank event.

    Example:
        >>> Moments.of(TrainConfig(epochs=4), per_epoch=50)
        Moments(steps=200, per_epoch=50, offset=0, freeze=100)
    """

    steps: int
    per_epoch: int
    offset: int
    freeze: int

    @classmethod
    def of(cls, config: TrainConfig, *, per_epoch: int) -> "Moments":
        """Return the moments of a complete configuration.

        Raises:
            ValueError: If ranks could never change, unless they are meant to stay.
        """
        steps = (config.epochs or 0) * per_epoch
        changes = config.start == "dense" and config.method == "dlrt"  # to another optimizer, with its own count
        offset = config.warmup_steps if changes else 0
        moments = cls(steps, per_epoch, offset, int(config.freeze * steps))
        if moments.adaptive_steps < 1:
            raise ValueError(
                f"freeze = {config.freeze:g} ends rank changes at step {moments.freeze} of {steps}, but they begin "
                f"only after step {offset}. Train for more epochs, freeze later, or warm up for fewer steps."
            )
        if config.every >= moments.adaptive_steps and config.rank_policy != "fixed":
            raise ValueError(
                f"every must be below the {moments.adaptive_steps} steps in which ranks may change, got "
                f"{config.every}: no rank could grow. Lower it, train for more epochs, or use rank policy fixed."
            )
        return moments

    @property
    def adaptive_steps(self) -> int:
        """Steps in which ranks may change."""
        return self.freeze - self.offset

    def ends_epoch(self, step: int) -> bool:
        """Whether an epoch ends with this step."""
        return step % self.per_epoch == 0

    def among(self, step: int, *, number: int) -> bool:
        """Whether this is one of about ``number`` steps spread evenly over the run; the last one always is."""
        return step % max(1, self.steps // number) == 0 or step == self.steps
