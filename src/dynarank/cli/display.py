"""The progress of a run: a live display on a terminal, a few plain lines elsewhere."""

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from dynarank.errors import missing_extra
from dynarank.experiments import Progress
from dynarank.experiments.processes import is_main
from dynarank.experiments.progress import Report, silent

LINES = 10  # about as many are printed for the low-rank network where there is no terminal; one for each other
LAYERS = 20  # at most as many are shown
BAR = 28  # characters of the bar of a full rank
_PARTS = " ▏▎▍▌▋▊▉"

_logger = logging.getLogger("dynarank.cli")


@contextmanager
def showing() -> Iterator[Report]:
    """Show progress and warnings on standard error until the block ends.

    Raises:
        ImportError: If rich is not installed.
    """
    try:
        from rich.console import Console
        from rich.live import Live
    except ImportError as error:
        raise missing_extra("rich", "cli") from error
    if not is_main():
        yield silent
        return
    console = Console(stderr=True, highlight=False)
    with logging_to(console):
        if not console.is_terminal:
            yield _tell_in_lines
            return
        with Live(console=console, refresh_per_second=8, transient=True) as live:
            display = _Display(live)
            yield display.show
            display.close()


@contextmanager
def logging_to(console: Any) -> Iterator[None]:
    """Print what the library logs, warnings and our own lines, above a live display."""
    handler = _ConsoleHandler(console)
    root = logging.getLogger("dynarank")
    level, own_level = root.level, _logger.level
    root.addHandler(handler)
    _logger.setLevel(logging.INFO)
    try:
        yield
    finally:
        root.removeHandler(handler)
        root.setLevel(level)
        _logger.setLevel(own_level)


class _ConsoleHandler(logging.Handler):
    def __init__(self, console: Any) -> None:
        super().__init__()
        self._console = console

    def emit(self, record: logging.LogRecord) -> None:
        prefix = "warning: " if record.levelno >= logging.WARNING else ""
        self._console.print(f"{prefix}{record.getMessage()}", markup=False, soft_wrap=True)


def _tell_in_lines(progress: Progress) -> None:
    every = -(-progress.epochs // LINES) if progress.ranks else progress.epochs
    if progress.event == "epoch" and (progress.epoch % every == 0 or progress.epoch == progress.epochs):
        _logger.info("%s", line(progress))


def line(progress: Progress) -> str:
    """Return the progress in one line.

    Example:
        >>> line(Progress("low rank", 50, 100, 1, 2, 0.25, "accuracy", 0.9, 300, 1000, ranks={"fc": 3}))
        'low rank: epoch 1 of 2, loss 0.25, validation accuracy 90.00 %, ranks 3, 30.0 % of dense'
    """
    parts = [f"epoch {progress.epoch} of {progress.epochs}", f"loss {progress.loss:.3g}"]
    if progress.validation is not None:
        parts.append(validation(progress))
    if progress.ranks:
        parts.append(f"ranks {' '.join(map(str, progress.ranks.values()))}")
        parts.append(f"{progress.parameters / progress.dense_parameters:.1%} of dense".replace("%", " %"))
    note = f" ({progress.note})" if progress.note else ""
    return f"{progress.network}{note}: {', '.join(parts)}"


def validation(progress: Progress) -> str:
    """Return the measure on the validation part in words."""
    if progress.validation is None:
        return ""
    value = f"{100 * progress.validation:.2f} %" if progress.measure == "accuracy" else f"{progress.validation:.4g}"
    return f"validation {progress.measure} {value}"


def rank_bar(rank: int, full: int) -> str:
    """Return a bar whose length is the rank, on a square-root scale so that small ranks can be seen.

    Example:
        >>> rank_bar(16, 64), len(rank_bar(64, 64))
        ('██████████████', 28)
    """
    eighths = round(8 * BAR * (rank / full) ** 0.5)
    return "█" * (eighths // 8) + (_PARTS[eighths % 8] if eighths % 8 else "")


class _Display:
    """A live picture of the network in training; a finished network leaves one line."""

    def __init__(self, live: Any) -> None:
        self._live = live
        self._last: Progress | None = None

    def show(self, progress: Progress) -> None:
        if self._last is not None and (self._last.network, self._last.note) != (progress.network, progress.note):
            self.close()
        self._last = progress
        self._live.update(_picture(progress))

    def close(self) -> None:
        if self._last is not None and self._last.event == "epoch":
            self._live.console.print(line(self._last), markup=False, soft_wrap=True)


def _picture(progress: Progress) -> Any:
    from rich.console import Group
    from rich.progress_bar import ProgressBar
    from rich.table import Table
    from rich.text import Text

    title = Text(progress.network, style="bold")
    title.append(f"  {progress.note}", style="not bold")
    head = Table.grid(padding=(0, 2))
    bar = ProgressBar(total=progress.steps, completed=progress.step, width=BAR)
    head.add_row(bar, Text(f"epoch {min(progress.epoch + 1, progress.epochs)} of {progress.epochs}"))
    numbers = Text(f"loss {progress.loss:.3g}  {validation(progress)}", no_wrap=True)
    if not progress.ranks:
        return Group(title, head, numbers)
    ranks = Table.grid(padding=(0, 2))
    for name, rank in list(progress.ranks.items())[:LAYERS]:
        full = progress.full_ranks.get(name, rank)
        ranks.add_row(Text(f"{rank_bar(rank, full):<{BAR}}", style="cyan"), Text(name), Text(f"rank {rank} of {full}"))
    share = 100 * progress.parameters / progress.dense_parameters
    left = f"; {len(progress.ranks) - LAYERS} more layers" if len(progress.ranks) > LAYERS else ""
    size = Text(f"{progress.parameters:,} of {progress.dense_parameters:,} parameters, {share:.1f} %{left}")
    return Group(title, head, numbers, ranks, size)
