"""The arguments of the commands, read by tyro into plain data."""

import contextlib
import dataclasses
import inspect
import io
import itertools
import sys
import typing
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, Any

from dynarank._discovery import discover
from dynarank.data import NAMES as DATA_SETS
from dynarank.errors import missing_extra
from dynarank.experiments import TrainConfig
from dynarank.experiments.defaults import DataDefaults
from dynarank.integrators.base import AbstractIntegrator
from dynarank.models import NAMES as MODELS
from dynarank.ranks.base import AbstractRankPolicy

SUMMARY = """Train PyTorch networks at low rank, with ranks that are found during training.

Failures are told in one line; set DYNARANK_DEBUG=1 to see where they come from.
"""
TRAIN = """Train a network at low rank and compare it with dense networks.

Without options: the handwritten digits of scikit-learn, in well under a minute.

Args:
{options}
    resume: Folder of an interrupted run to go on with, with its own settings.
    json: Print the outcome as one JSON object in the last line of the output.
"""
ALIASES = {"start": ("--begin",)}  # torchrun takes --start for an abbreviation of an option of its own
READERS = {int: ("INT", "a whole number"), float: ("FLOAT", "a number"), str: ("TEXT", "text")}


@dataclass(frozen=True)
class Train:
    """The command ``train``.

    Args:
        settings: Arguments of `TrainConfig`, given or by default.
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
        out: File to write, or a folder. Default: report.html in the folder of the run.
    """

    run: str
    out: str | None = None


@dataclass(frozen=True)
class Methods:
    """List layers, integrators, rank policies and schedules, with their options and papers."""


def parse(arguments: Sequence[str] | None) -> Train | Report | Methods:
    """Return the command that the arguments ask for.

    Args:
        arguments: Words after the name of the program; None for those of the process.

    Raises:
        ImportError: If tyro is not installed.
        ValueError: If the arguments cannot be read.
        SystemExit: After help was asked for.
    """
    try:
        import tyro
    except ImportError as error:
        raise missing_extra("tyro", "cli") from error
    words = sys.argv[1:] if arguments is None else list(arguments)
    train, report = _train_command(tyro), _report_command(tyro)
    command = _read(tyro, {"train": train, "report": report, "methods": Methods}, words or ["--help"])
    values = vars(command)
    if isinstance(command, train):
        settings = {field.name: values[field.name] for field in dataclasses.fields(TrainConfig)}
        return Train(settings, resume=values["resume"], json=values["json"])
    return Report(**values) if isinstance(command, report) else command


def _read(tyro: Any, commands: dict[str, Any], words: list[str]) -> Any:
    """Let tyro read the words; what it says about wrong ones in a box is told in one line."""
    told = io.StringIO()
    try:
        with contextlib.redirect_stderr(told):
            return tyro.extras.subcommand_cli_from_dict(commands, prog="dynarank", description=SUMMARY, args=words)
    except SystemExit as stop:
        if not stop.code:
            raise
        text = _unboxed(told.getvalue())
        command = f" {words[0]}" if words[0] in commands else ""
        text = text.removeprefix("Error parsing ")
        raise ValueError(f"{text}. See dynarank{command} --help.") from None


def _unboxed(text: str) -> str:
    """Return the first paragraph inside a box drawn with lines.

    Example:
        >>> _unboxed("╭─ Wrong ──╮\\n│ No such  │\\n│ option   │\\n│ ──────── │\\n│ See help │\\n╰──────────╯")
        'No such option'
    """
    inside = [line.strip("│ ") for line in text.splitlines() if line.startswith("│")]
    paragraph = list(itertools.takewhile(lambda line: line.strip("─"), inside))
    return " ".join(paragraph or text.split()).rstrip(".")


def _report_command(tyro: Any) -> Any:
    return _command(
        "Report",
        Report.__doc__,
        [
            ("run", Annotated[tyro.conf.Positional[str], tyro.conf.arg(metavar="RUN")], dataclasses.MISSING),
            ("out", _shown(tyro, str | None, "FILE"), None),
        ],
    )


def _train_command(tyro: Any) -> Any:
    """Return the fields of `TrainConfig` as a dataclass that checks nothing: messages about values are its own."""
    hints = typing.get_type_hints(TrainConfig)
    names = _names()
    fields: list[tuple[str, Any, Any]] = []
    for field in dataclasses.fields(TrainConfig):
        kind, name = hints[field.name], field.name
        by_data = field.default is None and name in {f.name for f in dataclasses.fields(DataDefaults)}
        shown = _shown(tyro, kind, names.get(name), by_data=by_data)
        shown = Annotated[shown, tyro.conf.arg(aliases=ALIASES[name])] if name in ALIASES else shown
        fields.append((name, shown, field.default))
    fields.append(("resume", _shown(tyro, str | None, "RUN"), None))
    fields.append(("json", tyro.conf.FlagCreatePairsOff[bool], False))
    options = (inspect.getdoc(TrainConfig) or "").split("Args:\n", 1)[1].split("\n\n", 1)[0]
    return _command("Train", TRAIN.format(options=options), fields)


def _command(name: str, text: str | None, fields: list[tuple[str, Any, Any]]) -> Any:
    missing = dataclasses.MISSING
    specs = [(key, kind) if default is missing else (key, kind, default) for key, kind, default in fields]
    return dataclasses.make_dataclass(name, specs, namespace={"__doc__": text, "__module__": __name__}, frozen=True)


def _names() -> dict[str, str]:
    """Return what the help shows in place of the values of some options."""
    choices = {
        "data": DATA_SETS,
        "model": MODELS,
        "integrator": discover("dynarank.integrators", AbstractIntegrator),
        "rank_policy": discover("dynarank.ranks", AbstractRankPolicy),
    }
    shown = {name: "|".join(sorted(values)) for name, values in choices.items()}
    return {**shown, "data_dir": "FOLDER", "out": "FOLDER", "device": "DEVICE"}


def _shown(tyro: Any, kind: Any, name: str | None, *, by_data: bool = False) -> Any:
    """Return the type of an option with what the help shows for its value and its default."""
    if typing.get_origin(kind) is typing.Literal or kind is bool:
        return kind
    optional = type(None) in typing.get_args(kind)
    member = next((part for part in typing.get_args(kind) if part is not type(None)), kind) if optional else kind
    hint = tyro.conf.arg(help_behavior_hint="(default: by data set)" if by_data else "")
    if member in READERS:
        reader = _reader(tyro, member, name)
        return Annotated[kind, reader, hint] if optional else Annotated[kind, reader]
    word = "KEY=VALUE ..." if member == tuple[str, ...] else "INT ..."
    return Annotated[kind, tyro.conf.arg(metavar=word), hint]


def _reader(tyro: Any, kind: type, name: str | None) -> Any:
    """Return how tyro reads one value; by itself it would offer the word None for an option that may be left out."""
    metavar, words = READERS[kind]

    def read(given: list[str]) -> Any:
        try:
            return kind(given[0])
        except ValueError:
            raise ValueError(f"must be {words}, got {given[0]!r}") from None

    return tyro.constructors.PrimitiveConstructorSpec(
        nargs=1,
        metavar=name or metavar,
        instance_from_str=read,
        is_instance=lambda value: value is None or isinstance(value, kind),
        str_from_instance=lambda value: [str(value)],
    )
