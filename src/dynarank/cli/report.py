"""The command ``report``: the page of a run."""

from dynarank.cli.arguments import Report
from dynarank.report import write_report


def make_report(command: Report) -> None:
    """Write the report and print where it is."""
    print(write_report(command.run, command.out))
