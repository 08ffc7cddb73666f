"""Compressing a trained network: what its layers could become, within a budget, and getting back what was lost."""

from dynarank.compress.compress import Compressor, compress_
from dynarank.compress.plan import Plan
from dynarank.compress.report import CompressedLayer, CompressionReport
from dynarank.compress.sensitivity import kl_divergence, relative_error
from dynarank.compress.statistics import renew_statistics_

__all__ = [
    "CompressedLayer",
    "CompressionReport",
    "Compressor",
    "Plan",
    "compress_",
    "kl_divergence",
    "relative_error",
    "renew_statistics_",
]
