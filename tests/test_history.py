import copy
import errno
import io
import json
import logging
import math
import os
import pickle
from pathlib import Path

import pytest
import torch

from dynarank.events import RankEvent
from dynarank.history import History

CUT = RankEvent(step=4, layer="fc1", old_rank=8, new_rank=5, candidates=2, tail=0.01, reason="tail")


def train(history: History, *, first: int, last: int, save_at: int | None = None) -> History:
    """Record steps ``first`` to ``last`` as a training loop would."""
    history.describe(dense_parameters=100, ranks={"fc1": 8}, command="train --seed 0")
    for step in range(first, last + 1):
        history.log(step=step, loss=1 / step, accuracy=torch.tensor(step / 10))
        if step == CUT.step:
            history.record(CUT)
        if step % 2 == 0:
            history.spectrum(step=step, singular_values={"fc1": torch.tensor([1.0, 0.5]) / step})
    return history


def strict(line: str) -> dict:
    """Parse JSON as the standard has it: no NaN, no Infinity."""

    def refuse(name: str) -> None:
        raise AssertionError(f"{name} is not JSON")

    return json.loads(line, parse_constant=refuse)


class FullDisk(io.BytesIO):
    def write(self, data) -> int:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def test_a_file_reads_as_what_was_recorded(tmp_path):
    history = train(History(tmp_path / "new" / "history.jsonl"), first=1, last=6)
    history.summarise(test_accuracy=0.9, comparison=[{"name": "dense", "parameters": 100}])
    read = History.read(tmp_path / "new" / "history.jsonl")
    assert read.records == history.records
    assert read.events == [CUT]
    assert read.ranks() == {"fc1": [(0, 8), (4, 5)]}
    assert read.series("loss")[1] == (2, 0.5)
    assert read.spectra()["fc1"][0] == (2, [0.5, 0.25])
    assert read.run["dense_parameters"] == 100
    assert read.summary == history.summary


def test_every_line_is_there_at_once(tmp_path):
    path = tmp_path / "history.jsonl"
    history = History(path)
    for step in range(3):
        history.log(step=step, loss=0.5)
        assert len(path.read_bytes().splitlines()) == step + 1


def test_numbers_that_are_not_finite_stay_standard_json_and_come_back(tmp_path):
    path = tmp_path / "history.jsonl"
    history = History(path)
    history.log(step=1, loss=math.nan, norm=torch.tensor(math.inf), low=-math.inf, absent=None)
    history.spectrum(step=1, singular_values={"fc1": [math.nan, 1.0]})
    history.summarise(test_loss=math.nan)
    assert all(strict(line) for line in path.read_text().splitlines())
    read = History.read(path)
    assert math.isnan(read.series("loss")[0][1])
    assert read.series("norm") == [(1, math.inf)]
    assert read.series("low") == [(1, -math.inf)]
    assert read.series("absent") == []
    assert math.isnan(read.spectra()["fc1"][0][1][0])
    assert read.summary is not None and math.isnan(read.summary["test_loss"])


def test_names_that_look_like_numbers_stay_names():
    event = RankEvent(step=1, layer="NaN", old_rank=2, new_rank=1, candidates=0, tail=math.inf, reason="Infinity")
    history = History()
    history.record(event)
    assert history.events == [event]


def test_facts_of_any_kind_are_recorded(tmp_path):
    history = History(tmp_path / "history.jsonl")
    history.describe(
        dtype=torch.float32, shape=torch.Size([3, 4]), names={"b", "a"}, where=Path("data"), first=CUT, w=torch.ones(2)
    )
    run = History.read(tmp_path / "history.jsonl").run
    assert run["dtype"] == "torch.float32"
    assert run["shape"] == [3, 4]
    assert run["names"] == ["a", "b"]
    assert run["where"] == "data"
    assert run["first"]["layer"] == "fc1"
    assert run["w"] == [1.0, 1.0]


@pytest.mark.parametrize(
    ("numbers", "error", "message"),
    [
        ({"loss": torch.ones(3)}, ValueError, r"loss must hold one number, got shape \(3,\)"),
        ({"loss": "low"}, TypeError, "loss must be a number or a tensor of one element, got str"),
        ({"loss": [1.0]}, TypeError, "got list"),
        ({"kind": 1.0}, ValueError, "'kind' names the kind of a record"),
    ],
)
def test_what_is_not_a_number_is_refused(numbers, error, message):
    history = History()
    with pytest.raises(error, match=message):
        history.log(step=1, **numbers)
    assert history.records == []


@pytest.mark.parametrize(("step", "error"), [(-1, ValueError), (1.5, TypeError), ("1", TypeError)])
def test_a_step_is_a_whole_number(step, error):
    with pytest.raises(error, match="step must be"):
        History().log(step=step, loss=0.5)


def test_a_cut_at_any_byte_loses_only_the_last_line(tmp_path):
    path = tmp_path / "history.jsonl"
    records = train(History(path), first=1, last=4).records
    data = path.read_bytes()
    for length in range(len(data) + 1):
        path.write_bytes(data[:length])
        complete = data[: length + 1].count(b"\n")  # a line that lacks only its newline is complete
        assert History.read(path).records == records[:complete]


@pytest.mark.parametrize("broken", ['{"kind": "met', "[1]", '{"step": 1}', '{"kind": "rank", "step": 1}', "\x00"])
def test_a_broken_line_elsewhere_names_file_and_line(tmp_path, broken):
    path = tmp_path / "history.jsonl"
    good = '{"kind": "metrics", "step": 1, "loss": 0.5}\n'
    path.write_text(f"{good}{broken}\n{good}")
    with pytest.raises(ValueError, match=r"history\.jsonl, line 2: not a record"):
        History.read(path)


def test_unknown_kinds_are_kept_and_ignored(tmp_path):
    path = tmp_path / "history.jsonl"
    path.write_text('{"kind": "weather", "step": 1, "rain": true}\n{"kind": "metrics", "step": 1, "loss": 0.5}\n')
    history = History(path, resume_at=1)
    assert len(history.metrics) == 1
    assert strict(path.read_text().splitlines()[0])["kind"] == "weather"


def test_a_full_disk_stops_the_file_with_one_warning_and_not_the_training(tmp_path, monkeypatch, caplog):
    path = tmp_path / "history.jsonl"
    history = History(path)
    history.log(step=1, loss=0.5)
    monkeypatch.setattr(Path, "open", lambda *args, **kwargs: FullDisk())
    with caplog.at_level(logging.WARNING):
        for step in (2, 3, 4):
            history.log(step=step, loss=0.5)
    monkeypatch.undo()
    assert len(caplog.records) == 1
    assert "No space left on device" in caplog.text
    assert [record["step"] for record in history.metrics] == [1, 2, 3, 4]
    assert len(History.read(path).metrics) == 1


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="only Linux has a device that is always full")
def test_the_always_full_device_gives_one_warning(caplog):
    history = train(History("/dev/full"), first=1, last=5)
    assert len(caplog.records) == 1
    assert len(history.metrics) == 5


def test_a_directory_that_disappears_does_not_stop_the_training(tmp_path, caplog):
    history = History(tmp_path / "run" / "history.jsonl")
    history.path.unlink()
    history.path.parent.rmdir()
    train(history, first=1, last=3)
    assert len(caplog.records) == 1


def test_other_processes_keep_their_record_in_memory(tmp_path):
    path = tmp_path / "run" / "history.jsonl"
    history = train(History(path, active=False), first=1, last=3)
    assert not path.parent.exists()
    assert len(history.metrics) == 3


def test_an_earlier_run_is_not_overwritten(tmp_path):
    path = tmp_path / "history.jsonl"
    train(History(path), first=1, last=3)
    before = path.read_bytes()
    with pytest.raises(FileExistsError, match="resume_at=step"):
        History(path)
    assert path.read_bytes() == before


@pytest.mark.parametrize("saved", [0, 3, 4, 10])
@pytest.mark.parametrize("torn", ["", '{"kind": "metrics", "st'])
def test_a_resumed_run_leaves_the_file_of_an_uninterrupted_one(tmp_path, saved, torn):
    whole = train(History(tmp_path / "whole.jsonl"), first=1, last=10)
    whole.summarise(test_accuracy=0.9)
    path = tmp_path / "parts.jsonl"
    train(History(path), first=1, last=10 if saved == 10 else 7)
    with path.open("a") as file:
        file.write(torn)
    resumed = train(History(path, resume_at=saved), first=saved + 1, last=10)
    resumed.summarise(test_accuracy=0.9)
    assert path.read_bytes() == (tmp_path / "whole.jsonl").read_bytes()
    assert resumed.records == whole.records


def test_resuming_a_finished_run_removes_its_summary(tmp_path):
    path = tmp_path / "history.jsonl"
    train(History(path), first=1, last=3).summarise(test_accuracy=0.9)
    assert History(path, resume_at=3).summary is None
    assert History.read(path).summary is None


def test_a_rewrite_that_fails_leaves_the_old_file_and_training_goes_on(tmp_path, monkeypatch, caplog):
    path = tmp_path / "history.jsonl"
    train(History(path), first=1, last=6)
    before = path.read_bytes()

    def fail(*args) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "replace", fail)
    history = train(History(path, resume_at=3), first=4, last=6)
    assert len(caplog.records) == 1
    assert path.read_bytes() == before
    assert list(tmp_path.iterdir()) == [path]
    assert len(history.metrics) == 6


def test_resuming_without_a_file_says_so_and_starts_one(tmp_path, caplog):
    path = tmp_path / "history.jsonl"
    train(History(path, resume_at=5), first=6, last=7)
    assert "its record starts after step 5" in caplog.text
    assert len(History.read(path).metrics) == 2


def test_resuming_needs_a_path():
    with pytest.raises(ValueError, match="resume_at needs a path"):
        History(resume_at=3)


def test_a_fact_told_twice_is_recorded_once_and_a_new_one_wins():
    history = History()
    history.describe(seeds=[0])
    history.describe(seeds=[0])
    history.describe(seeds=[1])
    assert len(history.records) == 2
    assert history.run == {"seeds": [1]}


def test_ranks_start_with_the_rank_before_the_first_event():
    history = History()
    history.record(CUT)
    assert history.ranks() == {"fc1": [(0, 8), (4, 5)]}


def test_layers_without_an_event_are_known_from_the_description():
    history = History()
    history.describe(ranks={"fc1": 6, "fc2": 3})
    history.record(CUT)
    assert history.ranks() == {"fc1": [(0, 6), (4, 5)], "fc2": [(0, 3)]}


@pytest.mark.parametrize("clone", [copy.deepcopy, lambda history: pickle.loads(pickle.dumps(history))])
def test_a_history_can_be_copied_while_it_writes(tmp_path, clone):
    history = train(History(tmp_path / "history.jsonl"), first=1, last=2)
    assert clone(history).records == history.records
