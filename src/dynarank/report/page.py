"""The report of a run: one HTML file that needs nothing else."""

import os
from pathlib import Path

from dynarank.history import HISTORY_FILE, History
from dynarank.report import sections
from dynarank.report.shell import page

REPORT_FILE = "report.html"


def write_report(source: str | os.PathLike[str], out: str | os.PathLike[str] | None = None) -> Path:
    """Write the report of a run as one self-contained HTML page and return its path.

    The page shows headline numbers, ranks and singular values over time, how the weights settle, loss, accuracy, size,
    the rank events with their reasons, and how to reproduce the run. It opens offline, in light and dark. What the
    history lacks is left out; a run without a summary is reported as interrupted.

    Args:
        source: Directory of the run, which holds ``history.jsonl``, or the history file itself.
        out: File to write, or a directory for ``report.html``. Default: ``report.html`` beside the history.

    Raises:
        FileNotFoundError: If there is no history at ``source``.
        ValueError: If the history is broken before its last line.
        ImportError: If matplotlib is not installed.

    Example:
        >>> import tempfile
        >>> from dynarank.events import RankEvent
        >>> with tempfile.TemporaryDirectory() as directory:
        ...     history = History(Path(directory) / "history.jsonl")
        ...     history.record(RankEvent(25, "fc1", old_rank=8, new_rank=5, candidates=0, tail=0.01, reason="budget"))
        ...     history.log(step=50, loss=0.2)
        ...     page = write_report(directory)
        ...     (page.name, "budget" in page.read_text(encoding="utf-8"))
        ('report.html', True)
    """
    file = _history_file(Path(source))
    target = file.with_name(REPORT_FILE) if out is None else Path(out)
    if target.is_dir():
        target = target / REPORT_FILE
    history = History.read(file)
    # Never the path of the directory: a page is passed on to others.
    place = file.resolve().parent.name if file.name == HISTORY_FILE else file.stem
    name = str(history.run.get("name") or place or "Training run")
    target.parent.mkdir(parents=True, exist_ok=True)
    temporary = target.with_name(target.name + ".tmp")
    # Names of layers and files need not be valid Unicode.
    temporary.write_text(render(history, name=name), encoding="utf-8", errors="replace")
    os.replace(temporary, target)
    return target


def render(history: History, *, name: str) -> str:
    """Return the page of a history as text."""
    parts = [
        sections.top(history, name=name),
        sections.comparison(history),
        sections.ranks(history),
        sections.spectra(history),
        sections.stability(history),
        sections.quality(history),
        sections.size(history),
        sections.events(history),
        sections.reproduce(history),
    ]
    return page(name, parts)


def _history_file(source: Path) -> Path:
    file = source / HISTORY_FILE if source.is_dir() else source
    if not file.is_file():
        raise FileNotFoundError(
            f"write_report: no history at {file}. Give the directory of a run, which holds {HISTORY_FILE}, "
            "or the path of a history file."
        )
    return file
