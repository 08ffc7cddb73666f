"""Real processes on this machine that train together over gloo. They are started once and reused."""

import importlib.util
import os
import pickle
import queue
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

FOLDER = Path(__file__).parent
SOURCE = FOLDER.parents[1] / "src"


class Pool:
    """Processes that each run the same scenario at the same time.

    Args:
        folder: For their meeting point and what they print.
        processes: How many.
        seconds: After which a process stops waiting for another.
    """

    def __init__(self, folder: Path, *, processes: int = 2, seconds: float = 60.0) -> None:
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"}
        environment["PYTHONPATH"] = os.pathsep.join([str(SOURCE), environment.get("PYTHONPATH", "")])
        self.seconds = seconds
        self._log = folder / "log"
        self._answers: list[queue.Queue[Any]] = []
        self._processes: list[subprocess.Popen[bytes]] = []
        with self._log.open("wb") as log:
            for process in range(processes):
                arguments = [str(process), str(processes), str(folder / "store"), str(seconds)]
                command = [sys.executable, str(FOLDER / "worker.py"), *arguments]
                pipe = subprocess.PIPE
                started = subprocess.Popen(command, stdin=pipe, stdout=pipe, stderr=log, env=environment)
                self._processes.append(started)
                self._answers.append(queue.Queue())
                threading.Thread(target=_listen, args=(started, self._answers[-1]), daemon=True).start()

    @property
    def alive(self) -> bool:
        return all(process.poll() is None for process in self._processes)

    def run(self, name: str, *, fails: bool = False, **arguments: Any) -> list[Any]:
        """Return what each process returned; with ``fails``, the traceback of those that raised instead."""
        for process in self._processes:
            assert process.stdin is not None
            pickle.dump((name, arguments), process.stdin)
            process.stdin.flush()
        answers = [self._answer(answer) for answer in self._answers]
        if fails or any(kind != "done" for kind, _ in answers):
            self.stop()  # the others may be in the middle of a message
        if not fails:
            told = "\n".join(text for kind, text in answers if kind != "done")
            assert not told, f"{told}\n{self._log.read_text(errors='replace')[-3000:]}"
        return [value for _, value in answers]

    def _answer(self, answers: "queue.Queue[Any]") -> tuple[str, Any]:
        try:
            return answers.get(timeout=self.seconds + 30)
        except queue.Empty:
            return "failed", "no answer: the process hangs"

    def stop(self) -> None:
        for process in self._processes:
            process.kill()
        for process in self._processes:
            process.wait()
            for pipe in (process.stdin, process.stdout):
                assert pipe is not None
                pipe.close()


def _listen(process: "subprocess.Popen[bytes]", answers: "queue.Queue[Any]") -> None:
    assert process.stdout is not None
    try:
        while True:
            answers.put(pickle.load(process.stdout))
    except (EOFError, OSError, ValueError, pickle.UnpicklingError):
        answers.put(("failed", f"process {process.args[2]} has ended"))  # type: ignore[index]


@pytest.fixture(scope="session")
def _pools(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    pools: list[Pool] = []

    def current() -> Pool:
        if not pools or not pools[-1].alive:
            pools.append(Pool(tmp_path_factory.mktemp("processes")))
        return pools[-1]

    yield current
    for pool in pools:
        if pool.alive:
            pool.stop()


@pytest.fixture
def pair(_pools: Any) -> Pool:
    """Two processes."""
    return _pools()


@pytest.fixture
def impatient_pair(tmp_path: Path) -> Iterator[Pool]:
    """Two processes of their own, which wait four seconds for each other."""
    pool = Pool(tmp_path, seconds=4.0)
    yield pool
    if pool.alive:
        pool.stop()


@pytest.fixture(scope="session")
def scenarios() -> ModuleType:
    """The scenarios, to be run in this one process."""
    spec = importlib.util.spec_from_file_location("distributed_scenarios", FOLDER / "scenarios.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["distributed_scenarios"] = module
    spec.loader.exec_module(module)
    return module
