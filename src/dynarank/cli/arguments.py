"""The arguments of the commands, read by tyro into plain data: a new command is a dataclass and an entry below."""

import dataclasses
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from dynarank._discovery import discover
from dynarank.analysis.analyzer import BUDGETS
from dynarank.cli.bench import SPEC as BENCH
from dynarank.cli.bench import Bench
from dynarank.cli.options import Spec, read
from dynarank.compress.budgets import MEASURES
from dynarank.compress.compress import METHODS
from dynarank.compress.forms.base import AbstractForm
from dynarank.data import NAMES as DATA_SETS
from dynarank.errors import missing_extra
from dynarank.experiments import TrainConfig
from dynarank.experiments.compress_config import CompressConfig
from dynarank.experiments.contest.config import ContestConfig
from dynarank.experiments.defaults import DataDefaults
from dynarank.experiments.tasks import TASKS
from dynarank.integrators.base import AbstractIntegrator
from dynarank.models import NAMES as MODELS
from dynarank.ranks.base import AbstractRankPolicy

SUMMARY = """Train PyTorch networks at low rank, with ranks that are found during training, and compress trained ones.

Failures are told in one line; set DYNARANK_DEBUG=1 to see where they come from.
"""


@dataclass(frozen=True)
class Train:
    """Train a network at low rank and compare it with dense networks.

    Without options: the handwritten digits of scikit-learn, in well under a minute.

    Args:
        resume: Folder of an interrupted run to go on with, with its own settings.
        json: Print the outcome as one JSON object in the last line of the output.
    """

    settings: dict[str, Any]
    resume: str | None = None
    json: bool = False


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


@dataclass(frozen=True)
class Pretrain:
    """Train the network of a built-in task from scratch: what compress starts from.

    Args:
        task: Name of the task, such as gpt, lenet5 or resnet20; `dynarank compare --list` shows all.
        steps: Optimizer steps; those of the task by default.
        fraction: Train a narrower network with at most this part of the parameters instead.
        data_dir: Folder with the data; without it the usual folders are searched, then they are downloaded.
        seed: Seed of the initial weights and of the batches.
        out: Folder of the trained network. Default: runs/trained/<task>-<seed>.
    """

    task: str
    steps: int | None = None
    fraction: float | None = None
    data_dir: str | None = None
    seed: int = 0
    out: str | None = None


@dataclass(frozen=True)
class Compress:
    """Compress a trained network, recover what was lost, and measure everything next to the network as given.

    Args:
        task: A Python file that defines model(), the trained network, and as much of evaluate(model),
            training_batches(seed), loss(outputs, batch), calibration_batches(), narrower(parameters), forward(model,
            batch) and example_batch as there is; or a built-in task, such as gpt or resnet20.
        weights: Folder of the trained network of a built-in task, made by pretrain.
        data_dir: Folder with the data of a built-in task.
        out: Folder of the result. Default: runs/compressed-<task>-<number>.
        json: Print the outcome as one JSON object in the last line of the output.
    """

    task: str
    settings: dict[str, Any]
    weights: str | None = None
    data_dir: str | None = None
    out: str | None = None
    json: bool = False


@dataclass(frozen=True)
class Evaluate:
    """Measure a compressed network next to the network as given.

    Args:
        task: The task that was compressed, as for compress.
        compressed: Folder of the compressed network.
        weights: Folder of the trained network of a built-in task.
        data_dir: Folder with the data of a built-in task.
        batch_sizes: Batch sizes to measure times at.
        seconds: About how long to measure at each batch size.
        json: Print the outcome as one JSON object in the last line of the output.
    """

    task: str
    compressed: str
    weights: str | None = None
    data_dir: str | None = None
    batch_sizes: tuple[int, ...] = CompressConfig.batch_sizes
    seconds: float = CompressConfig.seconds
    json: bool = False


@dataclass(frozen=True)
class Analyze:
    """Show what the weights of a network look like and what they could become at a few budgets; nothing is changed.

    Of a run it shows how its weights have settled: the measures of the last look and how they moved.

    Args:
        model: Weights: a file of safetensors or of torch.save, an index of shards, or a folder with one of these. Or a
            model: file.py:function or package.module:function that returns it, a Python file as for compress, or a
            built-in task, such as gpt or resnet20. Or the folder of a run.
        weights: Weights to load into the model of a function or of a built-in task.
        budgets: Parameters that the model may have: up to 1 as fractions of what it has, above 1 as numbers.
        include: Names of the weights to consider; all by default.
        exclude: Names of weights to leave alone.
        timed: Seconds to spend on timing each replacement of each layer; no timing by default.
        data_dir: Folder with the data of a built-in task.
        json: File to write the analysis to, as one JSON object.
        html: File to write the analysis to, as one page with drawings.
    """

    model: str
    weights: str | None = None
    budgets: tuple[float, ...] = BUDGETS
    include: tuple[str, ...] = ()
    exclude: tuple[str, ...] = ()
    timed: float | None = None
    data_dir: str | None = None
    json: str | None = None
    html: str | None = None


@dataclass(frozen=True)
class Calibrate:
    """Measure how long layers take on this machine, dense and low-rank, and keep it for plans of speed.

    Prints where layers of common shapes break even, and how good the fit is for shapes that it has not seen. Anything
    else that runs on the machine disturbs.

    Args:
        device: Where to measure.
        threads: Threads to compute with; by default as many as torch takes. What is kept holds for this number.
        seconds: About how long to take.
        json: Print the calibration as one JSON object in the last line of the output.
    """

    device: str = "cpu"
    threads: int | None = None
    seconds: float = 40.0
    json: bool = False


@dataclass(frozen=True)
class Compare:
    """Compare ways to train a network: quality, size, FLOPs, memory and time, every method tuned alike.

    Every method gets the same batches, steps and schedule, and as many learning rates to choose from by validation; the
    test part is looked at only by the runs that are reported. A narrower dense network, never smaller than the low-rank
    ones, runs beside them. Runs that end are kept at once, and the same command goes on after an interruption; methods,
    sizes and seeds may be added later. Times of a step are measured at the end, all methods in turn.

    Args:
        list: List the tasks and methods that there are, and stop.
        out: Folder of the comparison. Default: runs/compare-<task>-<number>.
        json: Print the outcome as one JSON object in the last line of the output.
    """

    settings: dict[str, Any]
    list: bool = False
    out: str | None = None
    json: bool = False


Command = Train | Report | Methods | Pretrain | Compress | Evaluate | Analyze | Bench | Calibrate | Compare


def parse(arguments: Sequence[str] | None) -> Command:
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
    return read(tyro, _commands(), words or ["--help"], description=SUMMARY)


def _commands() -> dict[str, Spec]:
    folders = dict.fromkeys(("data_dir", "out", "weights", "compressed"), "FOLDER")
    shown = folders | {"task": "TASK"}
    integrators = _choice(discover("dynarank.integrators", AbstractIntegrator))
    return {
        "train": Spec(
            Train,
            config=TrainConfig,
            metavars={
                **folders,
                "data": _choice(DATA_SETS),
                "model": _choice(MODELS),
                "integrator": integrators,
                "integrator_options": "KEY=VALUE ...",
                "rank_policy": _choice(discover("dynarank.ranks", AbstractRankPolicy)),
                "rank_options": "KEY=VALUE ...",
                "resume": "RUN",
                "device": "DEVICE",
            },
            hints={field.name: "(default: by data set)" for field in dataclasses.fields(DataDefaults)},
            aliases={"start": ("--begin",)},  # torchrun takes --start for an abbreviation of an option of its own
        ),
        "report": Spec(Report, positional=("run",), metavars={"run": "RUN", "out": "FILE"}),
        "methods": Spec(Methods),
        "pretrain": Spec(Pretrain, positional=("task",), metavars=folders | {"task": _choice(TASKS)}),
        "compress": Spec(
            Compress,
            config=CompressConfig,
            positional=("task",),
            metavars={
                **shown,
                "measure": _choice(MEASURES),
                "method": _choice(METHODS),
                "forms": f"{{{_choice(discover('dynarank.compress.forms', AbstractForm))}}} ...",
                "integrator": integrators,
                "only": "core|LAYER ...",
            },
        ),
        "bench": BENCH,
        "calibrate": Spec(Calibrate, metavars={"device": "DEVICE"}),
        "evaluate": Spec(Evaluate, positional=("task",), metavars=shown),
        "compare": Spec(
            Compare,
            config=ContestConfig,
            positional=("task",),
            metavars={
                **shown,
                "methods": "METHOD ...",
                "rank_policy": "POLICY ...",
                "lrs": "METHOD=LR,LR ...",
            },
            hints={
                "task": "",
                "methods": f"(default: {','.join(ContestConfig.methods)})",
                "seeds": f"(default: {' '.join(map(str, ContestConfig.seeds))})",
                "factors": f"(default: {' '.join(f'{factor:g}' for factor in ContestConfig.factors)})",
            },
        ),
        "analyze": Spec(
            Analyze,
            positional=("model",),
            metavars={
                **folders,
                "model": "MODEL",
                "weights": "FILE",
                "include": "NAME ...",
                "exclude": "NAME ...",
                "json": "FILE",
                "html": "FILE",
            },
            hints={"budgets": f"(default: {' '.join(map(str, BUDGETS))})"},
        ),
    }


def _choice(names: Any) -> str:
    return "|".join(sorted(names))
