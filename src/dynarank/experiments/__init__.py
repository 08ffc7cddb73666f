"""Training recipes: one low-rank run from start to report, resumable, next to the dense networks it competes with."""

from dynarank.experiments.config import TrainConfig
from dynarank.experiments.interruption import RunInterrupted
from dynarank.experiments.progress import Progress
from dynarank.experiments.training import resume, train

__all__ = ["Progress", "RunInterrupted", "TrainConfig", "resume", "train"]
