"""One training, any rank: random parts of the directions in training, and cuts to any size without it afterwards."""

from dynarank.elastic.budgets import ranks_within_flops, ranks_within_parameters
from dynarank.elastic.lasso import hierarchical_group_lasso
from dynarank.elastic.set_rank import order_, set_rank_
from dynarank.elastic.training import Elastic
from dynarank.elastic.widths import AbstractWidths, Fractions, OneLayer

__all__ = [
    "AbstractWidths",
    "Elastic",
    "Fractions",
    "OneLayer",
    "hierarchical_group_lasso",
    "order_",
    "ranks_within_flops",
    "ranks_within_parameters",
    "set_rank_",
]
