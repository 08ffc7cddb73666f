"""Progress is drawn on a terminal and told in a few lines elsewhere."""

import dataclasses
import io
import logging
import sys
from collections.abc import Iterator

import pytest
from rich.console import Console

from dynarank.cli import display
from dynarank.cli.display import line, rank_bar, showing
from dynarank.experiments import Progress


def progress(network: str = "low rank", *, epoch: int = 1, epochs: int = 2, event: str = "epoch") -> Progress:
    ranks = {"fc1": 3, "fc2": 40} if network == "low rank" else {}
    return Progress(
        network=network,
        step=10 * epoch,
        steps=10 * epochs,
        epoch=epoch,
        epochs=epochs,
        loss=0.125,
        measure="accuracy",
        validation=0.9,
        parameters=300,
        dense_parameters=1000,
        ranks=ranks,
        full_ranks=dict.fromkeys(ranks, 64),
        event="epoch" if event == "epoch" else "step",
        note="" if ranks else "learning rate 0.1",
    )


def test_a_line_tells_all():
    told = "low rank: epoch 1 of 2, loss 0.125, validation accuracy 90.00 %, ranks 3 40, 30.0 % of dense"
    assert line(progress()) == told
    assert line(progress("dense")) == (
        "dense (learning rate 0.1): epoch 1 of 2, loss 0.125, validation accuracy 90.00 %"
    )


def test_without_a_terminal_there_are_few_lines_on_standard_error(capsys: pytest.CaptureFixture[str]):
    with showing() as tell:
        for epoch in range(1, 31):
            tell(progress(epoch=epoch, epochs=30, event="step"))
            tell(progress(epoch=epoch, epochs=30))
        for epoch in range(1, 31):
            tell(progress("dense", epoch=epoch, epochs=30))
    shown = capsys.readouterr()
    assert shown.out == ""
    lines = shown.err.splitlines()
    assert len(lines) == 11
    assert lines[-2].startswith("low rank: epoch 30 of 30")
    assert lines[-1].startswith("dense (learning rate 0.1): epoch 30 of 30")
    assert "\x1b" not in shown.err


def test_warnings_of_the_library_are_shown(capsys: pytest.CaptureFixture[str]):
    with showing():
        logging.getLogger("dynarank.history").warning("the disk is %s [full]", "very")
    assert capsys.readouterr().err == "warning: the disk is very [full]\n"


def test_logging_is_left_as_it_was():
    logger = logging.getLogger("dynarank")
    before = (list(logger.handlers), logger.level, display._logger.level)
    with showing():
        pass
    assert (list(logger.handlers), logger.level, display._logger.level) == before


@pytest.fixture
def terminal(monkeypatch: pytest.MonkeyPatch) -> Iterator[io.StringIO]:
    """Let rich believe that standard error is a terminal of 80 columns."""
    written = io.StringIO()

    def console(**options: object) -> Console:
        return Console(file=written, force_terminal=True, width=80, highlight=False)

    monkeypatch.setattr("rich.console.Console", console)
    yield written


def test_the_picture_shows_every_layer():
    console = Console(file=io.StringIO(), width=80)
    with console.capture() as capture:
        console.print(display._picture(progress()))
    title, bar, numbers, first, second, size = (line.strip() for line in capture.get().splitlines())
    assert title == "low rank"
    assert bar.endswith("epoch 2 of 2")
    assert numbers == "loss 0.125  validation accuracy 90.00 %"
    assert first.startswith(rank_bar(3, 64))
    assert first.endswith("fc1  rank 3 of 64")
    assert second.endswith("fc2  rank 40 of 64")
    assert size == "300 of 1,000 parameters, 30.0 %"


def test_a_network_of_many_layers_does_not_fill_the_terminal():
    many = dataclasses.replace(progress(), ranks=dict.fromkeys(map(str, range(100)), 3))
    console = Console(file=io.StringIO(), width=80)
    with console.capture() as capture:
        console.print(display._picture(many))
    assert len(capture.get().splitlines()) == 24
    assert "80 more layers" in capture.get()


def test_on_a_terminal_each_network_leaves_a_line(terminal: io.StringIO):
    with showing() as tell:
        tell(progress(epoch=1))
        tell(progress(epoch=2))
        tell(progress("dense", epoch=1))
        tell(progress("dense", epoch=2))
    shown = terminal.getvalue()
    assert f"{line(progress(epoch=2))}\n" in shown
    assert f"{line(progress('dense', epoch=2))}\n" in shown
    assert "[bold]" not in shown


def test_bars_grow_with_the_rank():
    lengths = [len(rank_bar(rank, 512)) for rank in (1, 8, 64, 512)]
    assert lengths == sorted(set(lengths))


def test_rich_is_asked_for_where_it_is_missing(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(sys.modules, "rich.console", None)
    with pytest.raises(ImportError, match=r'rich.*pip install "dynarank\[cli\]"'), showing():
        pass
