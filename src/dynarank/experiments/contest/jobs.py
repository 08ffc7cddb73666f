"""Runs one after the other in this process, or several at a time in processes of one thread each."""

import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from dynarank._files import replacing
from dynarank.experiments.contest.methods import find_task
from dynarank.experiments.contest.run import Run, attempt
from dynarank.experiments.plain import standard
from dynarank.experiments.pretraining import Silent
from dynarank.experiments.tasks.base import AbstractTask

POLL = 0.05  # seconds between looks at the processes

Outcome = dict[str, Any]
Count = Callable[[Run, int, int, float], None]  # run, step, steps, loss


def one_by_one(runs: Sequence[Run], task: AbstractTask, tell: Count) -> Generator[tuple[Run, Outcome]]:
    """Carry out runs in this process and yield each with its outcome."""
    for run in runs:
        yield run, attempt(run, task, tell=lambda step, steps, loss, run=run: tell(run, step, steps, loss))


def side_by_side(runs: Sequence[Run], jobs: int, *, data_dir: str | None) -> Generator[tuple[Run, Outcome]]:
    """Carry out runs in ``jobs`` processes at a time and yield each with its outcome as it ends.

    A process that dies has failed; the others go on. None outlives this generator.
    """
    waiting = list(runs)
    with tempfile.TemporaryDirectory() as folder:
        running: dict[Run, _Process] = {}
        try:
            while waiting or running:
                while waiting and len(running) < jobs:
                    run = waiting.pop(0)
                    running[run] = _Process(run, Path(folder, str(len(waiting))), data_dir)
                for run in [run for run, process in running.items() if process.has_ended]:
                    yield run, running.pop(run).outcome()
                time.sleep(POLL)
        finally:
            for process in running.values():
                process.end()


@contextmanager
def one_thread() -> Iterator[None]:
    """Compute with one thread until the block ends, as the processes of `side_by_side` do."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


class _Process:
    """A run in a process of its own, which writes its outcome to a file."""

    def __init__(self, run: Run, stem: Path, data_dir: str | None) -> None:
        self._found, self._said = stem.with_suffix(".json"), stem.with_suffix(".txt")
        source = str(Path(__file__).parents[2])
        path = os.pathsep.join(filter(None, (source, os.environ.get("PYTHONPATH"))))
        with self._said.open("wb") as said:
            self._process = subprocess.Popen(
                [sys.executable, "-m", __name__, run.key, str(self._found), *filter(None, (data_dir,))],
                env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": path},
                stdin=subprocess.DEVNULL,
                stdout=said,
                stderr=said,
            )

    @property
    def has_ended(self) -> bool:
        return self._process.poll() is not None

    def outcome(self) -> Outcome:
        if self._found.exists():
            return json.loads(self._found.read_text(encoding="utf-8"))
        said = self._said.read_text(encoding="utf-8", errors="replace").strip().splitlines()
        return {"failed": f"its process ended with code {self._process.returncode}: {said[-1] if said else ''}"}

    def end(self) -> None:
        self._process.kill()
        self._process.wait()


def _main(key: str, out: str, data_dir: str | None = None) -> None:
    run = Run.of(key)
    with one_thread():
        outcome = attempt(run, find_task(run.task, data_dir), tell=Silent())
    with replacing(Path(out)) as partial:
        partial.write_text(json.dumps(standard(outcome)), encoding="utf-8")


if __name__ == "__main__":
    _main(*sys.argv[1:])
