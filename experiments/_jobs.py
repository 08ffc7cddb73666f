"""Jobs of a table, a process each, whose rows are kept: an interrupted table goes on where it was."""

import json
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict
from pathlib import Path
from typing import Any


def key_of(job: Any) -> str:
    """Return what tells a job, a dataclass, from every other."""
    return json.dumps(asdict(job), sort_keys=True)


def stored(store: Path) -> dict[str, dict[str, Any]]:
    """Return the rows of a file by key."""
    return {row["key"]: row for row in map(json.loads, store.read_text().splitlines())} if store.exists() else {}


def perform(
    jobs: Iterable[Any], store: Path, *, script: str, arguments: Iterable[str] = (), workers: int
) -> dict[str, dict[str, Any]]:
    """Carry out the jobs that the file does not hold yet, and return the rows of all by key.

    Args:
        jobs: Dataclasses of plain values.
        store: The file, a row of JSON each.
        script: Called as ``script ARGUMENTS --job KEY``; the last line that it prints is the row.
        arguments: More arguments of the script.
        workers: Processes at a time.

    Raises:
        RuntimeError: A job failed; rows of others are kept.
    """
    jobs, done = list(jobs), stored(store)

    def one(job: Any) -> tuple[Any, dict[str, Any]]:
        command = [sys.executable, script, *arguments, "--job", key_of(job)]
        out = subprocess.run(command, capture_output=True, text=True, check=False)
        if out.returncode:
            raise RuntimeError(f"{job}: {out.stderr[-2000:]}")
        return job, json.loads(out.stdout.splitlines()[-1])

    with ThreadPoolExecutor(workers) as pool, store.open("a") as file:
        for job, found in pool.map(one, [job for job in jobs if key_of(job) not in done]):
            row = done[key_of(job)] = {"key": key_of(job), **asdict(job), **found}
            file.write(json.dumps(row) + "\n")
            file.flush()
            print(job, found, flush=True)
    return {key_of(job): done[key_of(job)] for job in jobs}


def publish(
    jobs: Iterable[Any],
    page: Callable[[list[dict[str, Any]]], str],
    store: Path,
    *,
    script: str,
    workers: int,
    trial: bool,
) -> None:
    """Carry out what is missing and write the page of all rows beside the file, or print that of a trial."""
    with tempfile.TemporaryDirectory() as folder:
        rows = perform(jobs, Path(folder) / store.name if trial else store, script=script, workers=workers)
    text = page(list(rows.values()))
    if trial:
        print(text)
    else:
        store.with_suffix(".md").write_text(text)
