"""One run from start to report: the low-rank network, the networks it is compared with, and what is left on disk."""

import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch

from dynarank import checkpoint
from dynarank.experiments import comparison, verdict
from dynarank.experiments.config import TrainConfig
from dynarank.experiments.defaults import complete
from dynarank.experiments.interruption import RunInterrupted
from dynarank.experiments.low_rank_run import NAME, LowRankRun
from dynarank.experiments.problem import Problem, Quality
from dynarank.experiments.processes import Processes, joined
from dynarank.experiments.progress import Report, silent
from dynarank.experiments.run_folder import RunFolder, claim
from dynarank.history import History
from dynarank.report import write_report

_logger = logging.getLogger(__name__)


def train(config: TrainConfig, progress: Report | None = None) -> dict[str, Any]:
    """Train a network at low rank, evaluate it on the test part, and compare it with dense networks.

    The folder of the run holds ``history.jsonl``, ``checkpoint/`` (of every end of an epoch, for `resume`), ``model/``
    (the factors at the end, for `dynarank.checkpoint.load_model`) and, where matplotlib is installed, ``report.html``.
    Started by torchrun, all processes share every batch, and the first one writes and reports.

    Args:
        config: What to do.
        progress: Called with the progress of the run.

    Returns:
        The outcome: test_accuracy (None for regression), test_loss, loss, parameters, dense_parameters, removed,
        ranks, seconds, seed, out, report, comparison, verdict and more. The same numbers are in the history.

    Raises:
        ValueError: If the settings do not fit each other or the data, or the folder holds a run. Nothing was written.
        RuntimeError: If data cannot be downloaded, or a gradient is not finite.
        ImportError: If the data need a package that is not installed.
        RunInterrupted: At Ctrl-C. The run can be resumed.

    Example:
        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     config = TrainConfig("synthetic", planted_rank=3, epochs=10, compare=False, out=folder)
        ...     outcome = train(config)
        >>> outcome["ranks"], outcome["parameters"]
        ({'fc': 3}, 336)
    """
    config = complete(config)
    with _settings(config), joined(config.device) as processes:
        return _begin(config, processes, progress)


def resume(
    source: str | os.PathLike[str],
    progress: Report | None = None,
    *,
    data_dir: str | None = None,
    device: str | None = None,
    threads: int | None = None,
    compare: bool | None = None,
) -> dict[str, Any]:
    """Go on with an interrupted run from its last checkpoint, with its own settings.

    On the same machine, with the same number of threads, everything but times is what it would have been without the
    interruption, bit for bit. A run that has finished is not repeated: its outcome is returned.

    Args:
        source: Folder of the run.
        progress: Called with the progress of the run.
        data_dir: Where the data are now, if they have moved.
        device: Another device.
        threads: Another number of threads.
        compare: Whether dense networks are trained afterwards.

    Raises:
        FileNotFoundError: If the folder holds no checkpoint.
        ValueError: If the checkpoint is damaged.
        RunInterrupted: At Ctrl-C.
    """
    folder = RunFolder(Path(source))
    stored = checkpoint.load(folder.checkpoint, ignore="rest").extra["config"]
    changes = {"data_dir": data_dir, "device": device, "threads": threads, "compare": compare}
    config = replace(TrainConfig(**stored), **{name: value for name, value in changes.items() if value is not None})
    if (outcome := _outcome_of(folder)) is not None:
        _logger.warning("%s has finished before; nothing is trained.", folder.path)
        return outcome
    with _settings(config), joined(config.device) as processes:
        return _go_on(config, folder, processes, progress)


def _begin(config: TrainConfig, processes: Processes, progress: Report | None) -> dict[str, Any]:
    run = _make_run(config, processes, progress)
    folder = claim(config) if processes.is_main else None
    run.begin(folder)
    return _finish(run, folder)


def _go_on(config: TrainConfig, folder: RunFolder, processes: Processes, progress: Report | None) -> dict[str, Any]:
    run = _make_run(config, processes, progress)
    run.restore(folder)
    return _finish(run, folder if processes.is_main else None)


def _make_run(config: TrainConfig, processes: Processes, progress: Report | None) -> LowRankRun:
    problem = Problem.load(config, processes.device)
    return LowRankRun(problem, processes, progress if progress and processes.is_main else silent)


@contextmanager
def _settings(config: TrainConfig) -> Iterator[None]:
    """Set the number of threads, and put it and the global generators back afterwards."""
    threads = torch.get_num_threads()
    devices = list(range(torch.cuda.device_count())) if config.device.startswith("cuda") else []
    with torch.random.fork_rng(devices):
        torch.set_num_threads(config.threads or threads)
        try:
            yield
        finally:
            torch.set_num_threads(threads)


def _outcome_of(folder: RunFolder) -> dict[str, Any] | None:
    """Return the outcome of a finished run, or None."""
    summary = History.read(folder.history).summary if folder.history.exists() else None
    if summary is None:
        return None
    report = folder.path / "report.html"
    return {**summary, "out": str(folder.path), "report": str(report) if report.exists() else None}


def _finish(run: LowRankRun, folder: RunFolder | None) -> dict[str, Any]:
    try:
        run.train()
        outcome = _outcome(run)
        _save_model(run, folder, outcome)
        if run.config.compare:
            outcome |= _compared(run, outcome)
    except KeyboardInterrupt:
        raise RunInterrupted(None if folder is None else folder.path, run.saved_step) from None
    run.log.history.summarise(**outcome)
    report = None if folder is None else _report(folder)
    return {**outcome, "out": None if folder is None else str(folder.path), "report": report}


def _outcome(run: LowRankRun) -> dict[str, Any]:
    model = run.trainee.model
    validation, test = (run.problem.evaluate(model, part) for part in ("validation", "test"))
    parameters = run.deployed_parameters
    return {
        "data": run.config.data,
        "model": run.config.model,
        "test_accuracy": test.accuracy,
        "test_loss": test.loss,
        "validation_accuracy": validation.accuracy,
        "validation_loss": validation.loss,
        "loss": run.log.history.series("loss")[-1][1],
        "parameters": parameters,
        "dense_parameters": run.dense_parameters,
        "removed": 1 - parameters / run.dense_parameters,
        "flops_per_sample": run.flops_per_sample,
        "ranks": dict(run.ranks),
        "first_ranks": dict(run.first_ranks),
        "full_ranks": {name: min(shape) for name, shape in run.shapes.items()},
        "kept_dense": {entry.name: entry.reason for entry in run.report.kept_dense},
        "planted_rank": run.config.planted_rank,
        "seed": run.config.seed,
        "steps": run.moments.steps,
        "seconds": run.loop.seconds,
        "comparison": None,
        "verdict": [],
    }


def _save_model(run: LowRankRun, folder: RunFolder | None, outcome: dict[str, Any]) -> None:
    if folder is None:
        return
    names = ("test_accuracy", "test_loss", "parameters", "dense_parameters", "ranks")
    facts = {name: outcome[name] for name in names}
    try:
        checkpoint.save_model(folder.model, run.trainee.model, config=asdict(run.config), **facts)
    except OSError as error:
        _logger.warning("The trained network was not saved: %s", error.strerror or error)


def _compared(run: LowRankRun, outcome: dict[str, Any]) -> dict[str, Any]:
    """Return the rows of the table, and what they say."""
    contest = comparison.Comparison(run.problem, run.processes, run.moments, run.dense_parameters, run.tell)
    own = comparison.row(
        NAME,
        Quality(outcome["test_loss"], outcome["test_accuracy"]),
        parameters=outcome["parameters"],
        dense_parameters=run.dense_parameters,
        seconds=outcome["seconds"],
        steps=run.moments.steps,
        lr=run.config.lr,
    )
    rows, remarks = [own, contest.dense()], [comparison.method(run.config)]
    try:
        rows.append(contest.narrower(outcome["parameters"]))
    except ValueError as error:
        remarks.append(f"No narrower dense network: {error}")
    samples = len(run.problem.splits.test_targets)
    said = [sentence for other in rows[1:] for sentence in verdict.judge(own, other, samples=samples)]
    return {"comparison": rows, "verdict": [*said, *remarks]}


def _report(folder: RunFolder) -> str | None:
    try:
        return str(write_report(folder.path))
    except ImportError as error:
        _logger.warning("No report was written: %s", error)
    except OSError as error:
        _logger.warning("No report was written: %s.", error.strerror or error)
    return None
