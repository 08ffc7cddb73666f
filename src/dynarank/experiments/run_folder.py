"""Where a run keeps its files."""

from dataclasses import dataclass
from pathlib import Path
from typing import final

from dynarank.experiments.config import TrainConfig
from dynarank.history import HISTORY_FILE

RUNS = "runs"


@final
@dataclass(frozen=True)
class RunFolder:
    """The folder of a run.

    Args:
        path: The folder.
    """

    path: Path

    @property
    def history(self) -> Path:
        """File of the record."""
        return self.path / HISTORY_FILE

    @property
    def checkpoint(self) -> Path:
        """Folder of the checkpoint of the whole run, from which it goes on."""
        return self.path / "checkpoint"

    @property
    def model(self) -> Path:
        """Folder of the trained network."""
        return self.path / "model"

    @property
    def holds_run(self) -> bool:
        """Whether there is a run in the folder."""
        return self.history.exists() or self.checkpoint.exists()


def claim(config: TrainConfig) -> RunFolder:
    """Make the folder of a new run: the one that is asked for, or the next free number below ``runs``.

    Raises:
        ValueError: If the folder that is asked for holds a run, or is a file.
        OSError: If it cannot be made.
    """
    if config.out is None:
        return next_free(f"{config.data}-{config.model}")
    folder = RunFolder(Path(config.out))
    if folder.holds_run:
        raise ValueError(
            f"out: {config.out} already holds a run. Go on with it by --resume {config.out}, or name another folder."
        )
    if folder.path.exists() and not folder.path.is_dir():
        raise ValueError(f"out must be a folder, got the file {config.out}.")
    folder.path.mkdir(parents=True, exist_ok=True)
    return folder


def next_free(name: str) -> RunFolder:
    """Make a folder below ``runs``, of that name with the next free number."""
    taken = [path.name.removeprefix(f"{name}-") for path in Path(RUNS).glob(f"{name}-*")]
    number = max((int(text) for text in taken if text.isdecimal()), default=0) + 1
    while True:
        path = Path(RUNS) / f"{name}-{number}"
        try:
            path.mkdir(parents=True)
        except FileExistsError:  # another run was faster
            number += 1
        else:
            return RunFolder(path)
