"""The entry point: which command, and how its failures are told."""

import os
import sys
from collections.abc import Callable, Sequence

from dynarank.cli.analyze import run_analysis
from dynarank.cli.arguments import (
    Analyze,
    Bench,
    Calibrate,
    Compare,
    Compress,
    Evaluate,
    Methods,
    Pretrain,
    Report,
    Train,
    parse,
)
from dynarank.cli.bench import run_bench
from dynarank.cli.calibrate import run_calibration
from dynarank.cli.compare import run_comparison
from dynarank.cli.compress import run_compression
from dynarank.cli.evaluate import run_evaluation
from dynarank.cli.methods import list_methods
from dynarank.cli.pretrain import run_pretraining
from dynarank.cli.report import make_report
from dynarank.cli.train import run_training
from dynarank.errors import NonFiniteGradientError
from dynarank.experiments import RunInterrupted

DEBUG = "DYNARANK_DEBUG"  # any value: failures show their traceback
OK, FAILED, INTERRUPTED = 0, 2, 130
# What carries out a command; it returns an exit code, or None for 0.
ACTIONS: dict[type, Callable[..., int | None]] = {
    Methods: lambda command: list_methods(),
    Report: make_report,
    Train: run_training,
    Pretrain: run_pretraining,
    Compress: run_compression,
    Evaluate: run_evaluation,
    Analyze: run_analysis,
    Bench: run_bench,
    Calibrate: run_calibration,
    Compare: run_comparison,
}


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command and return its exit code: 0, 2 for a failure, told in one line, or 130 after Ctrl-C.

    Args:
        arguments: Words after the name of the program; those of the process by default.
    """
    if os.environ.get(DEBUG):
        return _run(arguments)
    try:
        return _run(arguments)
    except RunInterrupted as interruption:
        return _stop(_how_to_go_on(interruption), INTERRUPTED)
    except KeyboardInterrupt:
        return _stop("interrupted.", INTERRUPTED)
    except BrokenPipeError:  # the reader of our output, such as head, has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return OK
    except OSError as error:
        where = f": {error.filename}" if error.filename and error.strerror else ""
        return _stop(f"error: {error.strerror or error}{where}", FAILED)
    except NonFiniteGradientError as error:
        return _stop(f"error: {error} A smaller --lr or --base-lr may help.", FAILED)
    except (ValueError, ImportError, RuntimeError) as error:
        return _stop(f"error: {error}", FAILED)


def _run(arguments: Sequence[str] | None) -> int:
    command = parse(arguments)
    return ACTIONS[type(command)](command) or OK


def _how_to_go_on(interruption: RunInterrupted) -> str:
    if interruption.out is None:
        return "interrupted."
    return f"interrupted. Go on from step {interruption.step} with: dynarank train --resume {interruption.out}"


def _stop(message: str, code: int) -> int:
    if os.environ.get("RANK", "0") == "0":  # the processes of torchrun fail for the same reason
        print(f"dynarank: {message}", file=sys.stderr)
    return code
