"""The program as a process of its own: alone, interrupted, and as two processes under torchrun."""

import json
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

import dynarank
from dynarank.history import History

SOURCE = str(Path(dynarank.__file__).parents[1])
SIZE = ("--hidden", "16", "12", "--budget", "0.5", "--batch-size", "128", "--every", "4")
TINY = ("train", *SIZE, "--epochs", "4", "--no-compare", "--json")


def start(
    *words: str, folder: Path, launcher: tuple[str, ...] = (), program: str = "dynarank"
) -> subprocess.Popen[str]:
    path = os.pathsep.join(filter(None, (SOURCE, os.environ.get("PYTHONPATH"))))
    return subprocess.Popen(
        [sys.executable, "-m", *launcher, program, *words],
        cwd=folder,
        env={**os.environ, "PYTHONPATH": path, "MPLBACKEND": "agg"},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        preexec_fn=heed_interrupts,
    )


def heed_interrupts() -> None:
    """Let Ctrl-C count even where the tests run in the background of a shell, which makes children ignore it."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)


def finish(process: subprocess.Popen[str]) -> tuple[int, str, str]:
    out, err = process.communicate(timeout=300)
    return process.returncode, out, err


def torchrun() -> tuple[str, ...]:
    with socket.socket() as free:
        free.bind(("localhost", 0))
        return "torch.distributed.run", "--nproc-per-node", "2", "--master-port", str(free.getsockname()[1])


def outcome(out: str) -> dict[str, Any]:
    return json.loads(out.splitlines()[-1])


def test_the_program_trains_and_is_quiet_without_a_terminal(tmp_path: Path):
    code, out, err = finish(start(*TINY, folder=tmp_path))
    assert code == 0, err
    assert outcome(out)["out"] == "runs/digits-mlp-1"
    assert "\x1b" not in out + err
    assert [line.split(",")[0] for line in err.splitlines()] == [f"low rank: epoch {n} of 4" for n in (1, 2, 3, 4)]


@pytest.mark.slow
def test_ctrl_c_leaves_a_run_that_goes_on(tmp_path: Path):
    process = start("train", *SIZE, "--epochs", "400", "--no-compare", folder=tmp_path)
    checkpoint = tmp_path / "runs" / "digits-mlp-1" / "checkpoint" / "manifest.json"
    while process.poll() is None and not (checkpoint.exists() and json.loads(checkpoint.read_text())["step"] > 20):
        time.sleep(0.05)
    process.send_signal(signal.SIGINT)
    code, out, err = finish(process)
    assert (code, out) == (130, "")
    assert "with: dynarank train --resume runs/digits-mlp-1" in err.splitlines()[-1]
    assert "Traceback" not in err


@pytest.mark.slow
@pytest.mark.parametrize("start_mode", ["low", "dense"])
def test_two_processes_do_what_one_does(tmp_path: Path, start_mode: str):
    words = [*TINY, "--begin", start_mode, "--warmup-steps", "6"]
    code, out, err = finish(start(*words, "--out", "two", folder=tmp_path, launcher=(*torchrun(), "-m")))
    assert code == 0, err
    assert len([line for line in out.splitlines() if line.startswith("{")]) == 1
    two = outcome(out)
    one = outcome(finish(start(*words, "--out", "one", folder=tmp_path))[1])
    assert (two["ranks"], two["steps"], two["parameters"]) == (one["ranks"], one["steps"], one["parameters"])
    assert two["test_loss"] == pytest.approx(one["test_loss"], rel=1e-3)
    assert two["loss"] == pytest.approx(one["loss"], rel=1e-3)
    kinds = [[r["kind"] for r in History.read(tmp_path / name / "history.jsonl").records] for name in ("one", "two")]
    assert kinds[0] == kinds[1]


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/task").exists(), reason="threads are counted as Linux shows them")
def test_no_thread_of_the_process_group_outlives_it(tmp_path: Path):
    """One that does may abort the interpreter at its end."""
    script = str(Path(__file__).with_name("leaving.py"))
    code, _, err = finish(start(folder=tmp_path, launcher=torchrun(), program=script))
    assert code == 0, err
