"""From dense layers to low-rank ones and back: ``factorize_``, ``merge_``, ``to_plain_``, and what a model counts."""

from dynarank.factorize._counts import dense_state_dict, deployed_parameters, trainable_parameters
from dynarank.factorize._factorize import factorize_
from dynarank.factorize._merge import merge_, to_plain_
from dynarank.factorize._report import FactorizationReport, LayerEntry, MergedLayer, MergeReport
from dynarank.factorize._targets import ConvForm

__all__ = [
    "ConvForm",
    "FactorizationReport",
    "LayerEntry",
    "MergeReport",
    "MergedLayer",
    "dense_state_dict",
    "deployed_parameters",
    "factorize_",
    "merge_",
    "to_plain_",
    "trainable_parameters",
]
