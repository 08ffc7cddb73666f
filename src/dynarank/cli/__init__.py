"""The command line: it reads arguments, calls `dynarank.experiments`, and prints."""

from dynarank.cli.main import main

__all__ = ["main"]
