"""An interrupted run goes on as if nothing had happened, and nothing that was saved is lost."""

import errno
import json
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from dynarank import checkpoint
from dynarank.checkpoint import folder as checkpoint_folder
from dynarank.experiments import Progress, RunInterrupted, TrainConfig, low_rank_run, resume, train, training

MakeConfig = Callable[..., TrainConfig]


def interrupt_at(step: int, network: str = "low rank") -> Callable[[Progress], None]:
    def interrupt(progress: Progress) -> None:
        if progress.network == network and progress.step >= step:
            raise KeyboardInterrupt

    return interrupt


def records(run: Path) -> list[dict[str, Any]]:
    """Return the history without times."""
    found = [json.loads(line) for line in (run / "history.jsonl").read_text().splitlines()]
    for record in found:
        record.pop("seconds", None)
        for row in record.get("comparison") or ():
            row.pop("seconds"), row.pop("ms_per_step")
        if "verdict" in record:  # one sentence compares times
            record["verdict"] = [sentence for sentence in record["verdict"] if "times as long" not in sentence]
    return found


def factors(run: Path) -> str:
    """Return the name of the file with the trained factors, which names its content."""
    (path,) = (run / "model").glob("*.safetensors")
    return path.name


def without_times(outcome: dict[str, Any]) -> dict[str, Any]:
    kept = {key: value for key, value in outcome.items() if key not in ("seconds", "out", "report", "verdict")}
    rows = kept["comparison"] or []
    kept["comparison"] = [{k: v for k, v in row.items() if k not in ("seconds", "ms_per_step")} for row in rows]
    return kept


@pytest.mark.parametrize(
    ("step", "changes"),
    [
        pytest.param(5, {}, id="in the first epoch"),
        pytest.param(9, {}, id="at the end of an epoch"),
        pytest.param(15, {}, id="while ranks change"),
        pytest.param(30, {}, id="after ranks are frozen"),
        pytest.param(36, {}, id="at the last step"),
        pytest.param(6, {"method": "oialr", "warmup_steps": 10}, id="OIALR with full rank"),
        pytest.param(22, {"method": "oialr", "warmup_steps": 10}, id="OIALR with cores"),
        pytest.param(15, {"integrator": "augmented_bug", "integrator_options": ("coefficient_steps=5",)}, id="cycle"),
        pytest.param(30, {"integrator": "augmented_bug", "freeze": 1.0}, id="frozen at the last step"),
        pytest.param(15, {"start": "dense", "warmup_steps": 12}, id="before factorisation"),
        pytest.param(21, {"start": "dense", "warmup_steps": 12}, id="after factorisation"),
        pytest.param(15, {"start": "dense", "warmup_steps": 9}, id="factorised right after a checkpoint"),
    ],
)
def test_a_resumed_run_equals_the_uninterrupted_one(
    tiny: MakeConfig, tmp_path: Path, step: int, changes: dict[str, Any]
):
    whole = train(tiny(out=str(tmp_path / "whole"), **changes))
    with pytest.raises(RunInterrupted) as interruption:
        train(tiny(out=str(tmp_path / "part"), **changes), interrupt_at(step))
    assert interruption.value.out == tmp_path / "part"
    # The callback hears of the end of an epoch after its checkpoint.
    assert interruption.value.step == step // 9 * 9
    resumed = resume(tmp_path / "part")
    assert without_times(resumed) == without_times(whole)
    assert records(tmp_path / "part") == records(tmp_path / "whole")
    assert factors(tmp_path / "part") == factors(tmp_path / "whole")


def test_a_run_can_be_interrupted_many_times(tiny: MakeConfig, tmp_path: Path):
    train(tiny(out=str(tmp_path / "whole")))
    with pytest.raises(RunInterrupted):
        train(tiny(out=str(tmp_path / "part")), interrupt_at(7))
    for step in (12, 20, 29):
        with pytest.raises(RunInterrupted):
            resume(tmp_path / "part", interrupt_at(step))
    resume(tmp_path / "part")
    assert records(tmp_path / "part") == records(tmp_path / "whole")
    assert factors(tmp_path / "part") == factors(tmp_path / "whole")


def test_an_interrupted_comparison_is_done_again(tiny: MakeConfig, tmp_path: Path):
    whole = train(tiny(out=str(tmp_path / "whole"), compare=True))
    with pytest.raises(RunInterrupted):
        train(tiny(out=str(tmp_path / "part"), compare=True), interrupt_at(3, "dense"))
    assert without_times(resume(tmp_path / "part")) == without_times(whole)
    assert records(tmp_path / "part") == records(tmp_path / "whole")


def test_times_go_on_where_they_were(tiny: MakeConfig, tmp_path: Path):
    with pytest.raises(RunInterrupted):
        train(tiny(), interrupt_at(30))
    before = checkpoint.load(tmp_path / "run" / "checkpoint", ignore="rest").extra["run"]["seconds"]
    assert resume(tmp_path / "run")["seconds"] > before > 0


def test_a_finished_run_is_not_repeated(tiny: MakeConfig, tmp_path: Path, caplog: pytest.LogCaptureFixture):
    outcome = train(tiny())
    before = (tmp_path / "run" / "history.jsonl").read_bytes()
    (tmp_path / "run" / "report.html").touch()
    assert resume(tmp_path / "run") == outcome
    assert (tmp_path / "run" / "history.jsonl").read_bytes() == before
    assert "has finished before" in caplog.text


def test_a_folder_without_a_run_is_refused(tmp_path: Path):
    with pytest.raises(FileNotFoundError, match="holds no checkpoint"):
        resume(tmp_path)


def test_a_resumed_run_may_leave_out_the_comparison(tiny: MakeConfig, tmp_path: Path):
    with pytest.raises(RunInterrupted):
        train(tiny(compare=True), interrupt_at(20))
    assert resume(tmp_path / "run", compare=False)["comparison"] is None


def test_a_full_disk_stops_the_files_and_not_the_training(
    tiny: MakeConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
):
    expected = train(tiny(out=str(tmp_path / "whole")))

    def fill_the_disk(progress: Progress) -> None:
        if progress.step == 20:
            monkeypatch.setattr(checkpoint_folder, "_write", no_space)
            monkeypatch.setattr(Path, "open", no_space)

    def no_space(*args: Any, **kwargs: Any) -> Any:
        raise OSError(errno.ENOSPC, "No space left on device")

    with caplog.at_level(logging.WARNING):
        outcome = train(tiny(), fill_the_disk)
    monkeypatch.undo()
    assert without_times(outcome) == without_times(expected)
    assert sum("Training goes on" in message for message in caplog.messages) == 1
    assert "The trained network was not saved" in caplog.text
    assert checkpoint.load(tmp_path / "run" / "checkpoint", ignore="rest").step == 18
    monkeypatch.setattr(training, "write_report", lambda folder: folder / "report.html")
    assert without_times(resume(tmp_path / "run")) == without_times(expected)
    assert factors(tmp_path / "run") == factors(tmp_path / "whole")


def test_an_interruption_while_a_checkpoint_is_written_loses_nothing(
    tiny: MakeConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    train(tiny(out=str(tmp_path / "whole")))
    written = 0

    def cut_off(file: Any, piece: Any) -> None:
        nonlocal written
        written += 1
        if written == 90:
            file.write(bytes(piece)[: len(piece) // 2])
            raise KeyboardInterrupt
        file.write(piece)

    monkeypatch.setattr(checkpoint_folder, "_write", cut_off)
    with pytest.raises(RunInterrupted) as interruption:
        train(tiny(out=str(tmp_path / "part")))
    assert 0 < interruption.value.step < 36
    resume(tmp_path / "part")
    assert records(tmp_path / "part") == records(tmp_path / "whole")
    assert factors(tmp_path / "part") == factors(tmp_path / "whole")


def test_a_checkpoint_is_written_at_the_start_and_at_every_end_of_an_epoch(
    tiny: MakeConfig, monkeypatch: pytest.MonkeyPatch
):
    steps = []

    def save(folder: Path, *, step: int, **objects: Any) -> None:
        steps.append(step)

    monkeypatch.setattr(low_rank_run.checkpoint, "save", save)
    monkeypatch.setattr(training.checkpoint, "save_model", lambda *args, **facts: None)
    train(tiny())
    assert steps == [0, 9, 18, 27, 36]
