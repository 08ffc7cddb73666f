"""What happened in a run, to look at: one HTML page, and a picture of the ranks. Needs the extra ``viz``."""

from dynarank.report.image import plot_ranks
from dynarank.report.page import write_report

__all__ = ["plot_ranks", "write_report"]
