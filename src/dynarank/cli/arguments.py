"""The arguments of the commands, read by tyro into dataclasses."""

import dataclasses
import inspect
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, Any

from dynarank._discovery import discover
from dynarank.data import NAMES as DATA_SETS
from dynarank.errors import missing_extra
from dynarank.experiments import TrainConfig
from dynarank.integrators.base import AbstractIntegrator
from dynarank.models import NAMES as MODELS
from dynarank.ranks.base import AbstractRankPolicy

SUMMARY = "Train PyTorch networks at low rank, with ranks that are found during training."


@dataclass(frozen=True)
class Train:
    """The command ``train``.

    Args:
        settings: What `TrainConfig` takes, as given or by default.
        resume: Folder of a run to go on with.
        json: Whether the last line of the output is the outcome as JSON.
    """

    settings: dict[str, Any]
    resume: str | None
    json: bool


@dataclass(frozen=True)
class Report:
    """Write the report of a run as one HTML page.

    Args:
        run: Folder of the run, or its history file.
        out: File to write. Default: report.html in the folder of the run.
    """

    run: str
    out: str | None = None


@dataclass(frozen=True)
class Methods:
    """List layers, integrators, rank policies and schedules, with their papers."""


def parse(arguments: Sequence[str] | None) -> Train | Report | Methods:
    """Return the command that the arguments ask for.

    Raises:
        ImportError: If tyro is not installed.
        SystemExit: After help was asked for (code 0), or if the arguments cannot be read (code 2).
    """
    try:
        import tyro
    except ImportError as error:
        raise missing_extra("tyro", "cli") from error
    subcommand, positional = tyro.conf.subcommand, tyro.conf.arg(constructor=None, metavar="RUN")
    report = dataclasses.make_dataclass(
        "Report",
        [("run", tyro.conf.Positional[Annotated[str, positional]]), ("out", str | None, None)],
    )
    report.__doc__ = Report.__doc__
    train = _train_arguments(tyro)
    command = tyro.cli(
        Annotated[train, subcommand("train")]  # type: ignore[arg-type]
        | Annotated[report, subcommand("report")]
        | Annotated[Methods, subcommand("methods")],
        prog="dynarank",
        description=SUMMARY,
        args=arguments if arguments is None else list(arguments),
    )
    if isinstance(command, Methods):
        return command
    values = vars(command)
    if isinstance(command, report):
        return Report(**values)
    return Train(resume=values.pop("resume"), json=values.pop("json"), settings=values)
