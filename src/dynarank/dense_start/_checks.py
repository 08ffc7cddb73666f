"""What a dense start accepts, checked at the door."""

import torch

from dynarank.switches.base import AbstractSwitch


def check_options(
    *, every: int | None, trained: str, window: float | None, largest_cut: float | None, state: str
) -> None:
    """Raise unless the options of a dense start are in range."""
    if every is not None and every < 1:
        raise ValueError(f"every must be at least 1, or None for one cut only, got {every}.")
    for name, value, allowed in (
        ("trained", trained, ("core", "factors")),
        ("state", state, ("fresh", "transported")),
    ):
        if value not in allowed:
            raise ValueError(f"{name} must be {' or '.join(map(repr, allowed))}, got {value!r}.")
    if window is not None and not 0 < window <= 1:
        raise ValueError(f"window must be above 0 and at most 1, got {window}.")
    if window is not None and every is None:
        raise ValueError(
            f"window={window} needs every: it grows at each refresh, and with one cut only most layers would never be "
            "reached. Pass every, or window=None."
        )
    if largest_cut is not None and not 0 < largest_cut <= 1:
        raise ValueError(f"largest_cut must be above 0 and at most 1, got {largest_cut}.")


def check_switch(switch: AbstractSwitch, steps: int | None) -> None:
    """Raise if a switch never looks within a run of so many steps."""
    if steps is not None and not any(switch.looks(step) for step in range(1, steps)):
        raise ValueError(
            f"{switch} never looks before the end of a run of {steps} steps: no layer would ever go low-rank. Let it "
            "look earlier, or train for longer."
        )


def refuse_processes() -> None:
    """Raise in a run of several processes."""
    distributed = torch.distributed
    if distributed.is_available() and distributed.is_initialized() and distributed.get_world_size() > 1:
        raise RuntimeError(
            f"a dense start works in one process, and this run has {distributed.get_world_size()}: layers that change "
            "on the way would part. Train dense first, then use factorize_ and LowRankOptimizer."
        )
