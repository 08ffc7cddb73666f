"""What a training run tells while it runs."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Literal


@dataclass(frozen=True)
class Progress:
    """Where a run stands.

    Args:
        network: What is being trained: ``"low rank"``, ``"dense"`` or ``"narrower dense"``.
        step: Optimizer steps taken.
        steps: Steps of the whole training.
        epoch: Epochs completed.
        epochs: Epochs of the whole training.
        loss: Last training loss.
        measure: Name of the measure of quality: ``"accuracy"`` or ``"loss"``.
        validation: The measure on the validation part at the last end of an epoch.
        parameters: Parameters as deployed now.
        dense_parameters: Parameters of the dense network.
        ranks: Rank of each low-rank layer; empty for dense networks.
        full_ranks: Largest possible rank of each low-rank layer.
        event: ``"step"``, or ``"epoch"`` at the end of one.
        note: What else there is to say, such as the learning rate of a dense network.
    """

    network: str
    step: int
    steps: int
    epoch: int
    epochs: int
    loss: float
    measure: str
    validation: float | None
    parameters: int
    dense_parameters: int
    ranks: Mapping[str, int] = field(default_factory=dict)
    full_ranks: Mapping[str, int] = field(default_factory=dict)
    event: Literal["step", "epoch"] = "step"
    note: str = ""


Report = Callable[[Progress], None]
"""Called with the progress of a run, many times; it must be quick and must not raise."""


def silent(progress: Progress) -> None:
    """Tell nobody."""
