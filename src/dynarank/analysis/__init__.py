"""What a trained model or a file of weights holds, and what compressing it would bring."""

from dynarank.analysis.analyzer import analyze
from dynarank.analysis.findings import Analysis

__all__ = ["Analysis", "analyze"]
