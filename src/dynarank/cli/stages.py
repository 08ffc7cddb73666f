"""The progress of a compression: one changing line on a terminal, a few plain lines elsewhere."""

from collections.abc import Iterator
from contextlib import contextmanager

from dynarank.cli.display import LINES, logging_to
from dynarank.errors import missing_extra
from dynarank.experiments.compression import Stage, Tell


@contextmanager
def telling() -> Iterator[Tell]:
    """Show stages and warnings on standard error until the block ends.

    Raises:
        ImportError: If rich is not installed.
    """
    try:
        from rich.console import Console
        from rich.markup import escape
    except ImportError as error:
        raise missing_extra("rich", "cli") from error
    console = Console(stderr=True, highlight=False)
    with logging_to(console):
        if console.is_terminal:
            with console.status("") as status:
                yield lambda stage: status.update(escape(line(stage)))
        else:
            yield lambda stage: console.print(line(stage), markup=False, soft_wrap=True) if _worth(stage) else None


def line(stage: Stage) -> str:
    """Return a stage in one line.

    Example:
        >>> line(Stage("recovery", 50, 200, 0.25)), line(Stage("measuring"))
        ('recovery: step 50 of 200, loss 0.25', 'measuring')
    """
    if not stage.steps:
        return f"{stage.name}: {stage.said}" if stage.said else stage.name
    return f"{stage.name}: step {stage.step} of {stage.steps}, loss {stage.loss:.4g}"


def _worth(stage: Stage) -> bool:
    """Whether a stage is told where there is no terminal: of a training about every tenth part."""
    every = 50 * max(1, round(stage.steps / LINES / 50))  # training tells every 50 steps
    return stage.step % every == 0
