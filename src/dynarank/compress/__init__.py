"""Compressing a trained network: what its layers could become, within a budget, and getting back what was lost."""

from dynarank.compress.compress import Compressor, compress_
from dynarank.compress.distillation import SoftTargets, cosine_distance
from dynarank.compress.plan import Plan
from dynarank.compress.recovery import Recovery, recover_, training_only
from dynarank.compress.report import CompressedLayer, CompressionReport
from dynarank.compress.sensitivity import kl_divergence, relative_error
from dynarank.compress.statistics import renew_statistics_
from dynarank.compress.tolerance import Tolerated, compress_to_tolerance_

__all__ = [
    "CompressedLayer",
    "CompressionReport",
    "Compressor",
    "Plan",
    "Recovery",
    "SoftTargets",
    "Tolerated",
    "compress_",
    "compress_to_tolerance_",
    "cosine_distance",
    "kl_divergence",
    "recover_",
    "relative_error",
    "renew_statistics_",
    "training_only",
]
