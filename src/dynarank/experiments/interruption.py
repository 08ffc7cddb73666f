"""Ctrl-C during a run: what is saved, and where."""

from pathlib import Path


class RunInterrupted(KeyboardInterrupt):
    """The run was interrupted by the user; it can go on from its last checkpoint.

    Args:
        out: Folder of the run; None on processes that write nothing.
        step: Optimizer steps taken at the last checkpoint.
    """

    def __init__(self, out: Path | None, step: int) -> None:
        super().__init__(f"interrupted; the last checkpoint in {out} is of step {step}")
        self.out = out
        self.step = step
